"""Pictures of the experiments on symmetries of data, from their runs."""

from collections.abc import Mapping, Sequence

import numpy as np

from rigpt_hf.pictures import COLOURS, figure, picture
from rigpt_hf.pictures.style import BESIDE, LETTERS, Figure

from ..common import band


Curve = Sequence[tuple[float, float]]


@picture
def draw_shares(columns: Mapping[str, Mapping[str, Sequence[float]]], label: str, *, title: str) -> Figure:
    """
    One panel for each column: a row for each learner with the share of every seed and their mean.

    Args:
        columns: By title, then by learner, shares between 0 and 1.
        label: Of the shares.
        title: What is seen.
    """
    names = max((len(name) for learners in columns.values() for name in learners), default=0)
    # Names stand beside the first panel.
    width = 2.6 + names / LETTERS / len(columns)
    made, panels = figure(len(columns), title=title, width=width, height=2.8, sharey=True)
    for panel, (name, learners) in zip(panels, columns.items(), strict=True):
        for place, values in enumerate(reversed(list(learners.values()))):
            colour = COLOURS[(len(learners) - 1 - place) % len(COLOURS)]
            panel.barh(place, np.mean(values) if values else 0, color=colour, alpha=0.35)
            panel.plot(values, [place] * len(values), "o", color=colour, ms=4)
        panel.set(title=name, xlim=(-0.03, 1.03), xlabel=label)
        panel.set_yticks(range(len(learners)), list(learners)[::-1])
    return made


@picture
def draw_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], x: str, y: str, *, title: str, logarithmic: bool = False
) -> Figure:
    """
    One panel for each problem, in rows of two: a line for each learner, the mean of its seeds, and a band
    over all of them.

    Args:
        panels: By title, then by learner, one curve of `(x, y)` for each seed; all of a learner at the same places.
        x, y: Labels.
        title: What is seen.
        logarithmic: Whether `x` is on a logarithmic scale, with ticks where something was measured.
    """
    # One panel alone is as wide as two, or its legend would not fit below it.
    width = 6.4 if len(panels) == 1 else 3.2
    made, drawn = figure(len(panels), title=title, width=width, height=3.0, sharey=True)
    for panel, (called, learners) in zip(drawn, panels.items(), strict=True):
        for name, curves in learners.items():
            if curves:
                points = np.array(curves)
                band(panel, points[0, :, 0].tolist(), points[:, :, 1], name, alpha=0.15)
        panel.set(title=called if len(panels) > 1 else "", xlabel=x)
        if logarithmic:
            panel.set_xscale("log")
            places = sorted({place for curves in learners.values() for curve in curves for place, _ in curve})
            panel.set_xticks(places, [f"{place:g}" for place in places])
            panel.minorticks_off()
    for first in drawn[::BESIDE]:
        first.set_ylabel(y)
    handles, labels = drawn[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3)
    return made
