"""The learning rate along a run."""

import math
from collections.abc import Callable

from .options import OptimizerOptions


def make_schedule(options: OptimizerOptions, steps: int) -> Callable[[int], float]:
    """
    What the peak rate is multiplied by in step `n` (from 0): linear warm-up, constant, then a fall to `final`.

    The rate of the last step is `final` itself.
    """
    start = round(steps * (1 - options.decay))

    def factor(step: int) -> float:
        if step < options.warmup:
            return (step + 1) / options.warmup
        if step < start or options.schedule == "constant":
            return 1.0
        share = min((step - start + 1) / max(steps - start, 1), 1.0)
        if options.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return 1 - share * (1 - options.final)

    return factor
