"""Losses of training runs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .style import COLOURS, Figure, figure, picture


@picture
def plot_losses(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Figure:
    """Training losses as lines and validation losses as dots over steps, by the name of the run; entries of logs."""
    made, (panel,) = figure(title=_said(runs), width=7, height=4.4)
    for colour, (name, entries) in zip(itertools.cycle(COLOURS), runs.items(), strict=False):
        points = [(entry["step"], entry["loss"]) for entry in entries if math.isfinite(entry["loss"])]
        panel.plot(*zip(*points, strict=True), color=colour, lw=0.8, alpha=0.7, label=name)
        held_out = [(entry["step"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
        if held_out:
            panel.plot(*zip(*held_out, strict=True), "o", color=colour, ms=4, label=f"{name}, validation")
    panel.set(xlabel="step", ylabel="loss (nats per token)")
    panel.legend()
    return made


def _said(runs: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The title; for one run it says the first loss and the last."""
    if len(runs) != 1:
        return "Losses in training, step by step: lower is better"
    (entries,) = runs.values()
    losses = [entry["loss"] for entry in entries if math.isfinite(entry["loss"])]
    if len(losses) < 2:
        return "Loss in training: lower is better"
    way = "falls" if losses[-1] < losses[0] else "goes"
    return f"The training loss {way} from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"
