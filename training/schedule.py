"""The learning rate along a run."""

import math
from collections.abc import Callable

from .options import OptimizerOptions


def make_schedule(options: OptimizerOptions, steps: int) -> Callable[[int], float]:
    """
    The factor of the peak rate in step `n` (from 0): linear warm-up, constant, then a fall to `min_lr_rate`.

    The rate of the last step is `min_lr_rate` of the peak itself.
    """
    start = round(steps * (1 - options.decay_fraction))

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        if step < start or options.lr_scheduler_type == "constant":
            return 1.0
        share = min((step - start + 1) / max(steps - start, 1), 1.0)
        if options.lr_scheduler_type == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return 1 - share * (1 - options.min_lr_rate)

    return factor
