"""How long things take, side by side: they take turns, so that the machine's moods fall on all of them."""

import re
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import timer  # which waits for what a GPU has to do


@dataclass(frozen=True)
class Prepared:
    """An action that needs something first, which takes time that is not its own."""

    prepare: Callable[[], Any]
    act: Callable[[Any], Any]


Action = Callable[[], Any] | Prepared


def take_turns(
    actions: Mapping[str, Action], turns: int, progress: Callable[[], Any] = lambda: None, units: float = 1
) -> dict[str, list[float]]:
    """
    Seconds of each action, by its name, in every turn after one that warms up and does not count.

    Another action is first in every turn, so that none always finds the caches as the same other one left them.

    Args:
        actions: What is timed.
        turns: How often.
        progress: Called after every turn, the first one too.
        units: Of work in an action, such as tokens; the seconds are those of one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name in list(actions) if turn % 2 else list(actions)[::-1]:
            action = actions[name]
            given = (action.prepare(),) if isinstance(action, Prepared) else ()
            act: Callable[..., Any] = action.act if isinstance(action, Prepared) else action
            start = timer()
            act(*given)
            elapsed = timer() - start
            if turn:
                seconds[name].append(elapsed / units)
        progress()
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The ratio of the seconds of two actions in each turn."""
    return [one / other for one, other in zip(numerator, denominator, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median": median, "lower": lower, "upper": upper}


def device_name() -> str:
    """The name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def own_peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` starts from the peak of the parent process there
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
