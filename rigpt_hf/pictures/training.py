"""Losses of training runs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, Figure, figure, picture


@picture
def plot_losses(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Training losses as lines and validation losses as dots over steps, by the name of the run; entries of logs."""
    made, (panel,) = figure(width=7, height=4.4)
    for colour, (name, entries) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        points = [(entry["step"], entry["loss"]) for entry in entries if math.isfinite(entry["loss"])]
        panel.plot(*zip(*points, strict=True), color=colour, lw=0.8, alpha=0.7, label=name)
        held_out = [(entry["step"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
        if held_out:
            panel.plot(*zip(*held_out, strict=True), "o", color=colour, ms=4, label=f"{name}, validation")
    panel.set(xlabel="step", ylabel="loss (nats per token)")
    panel.legend()
    return made
