"""Helpers of all pictures of results: axes that can be read, ticks, and numbers beside the measurements."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .numbers import number as shown
from .numbers import plain


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# One for each frame or dtype.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
# Inches. Stretched over the column of the page its letters are those of the text, and can still be read on a phone.
WIDTH, LETTERS = 5.8, 84
# An axis is linear where nothing is larger than so many times what the eye must tell from zero, or so many times
# what nine tenths of all numbers are larger than.
LINEAR, ALIKE = 3, 10
MOST_TICKS = 8
STEPS = (1, 2, 2.5, 5, 10)
INTERVALS = "what was measured, with intervals of 95 %"
IN_TABLE = "The numbers stand in the table."


def number(value: float | None) -> float:
    """A number that a picture leaves out if there is none."""
    return math.nan if value is None else value


def interval(entry: dict[str, Any] | None) -> list[float]:
    """The ends of an interval, which a picture leaves out if there is none."""
    return [math.nan if entry is None else number(entry.get(end)) for end in ("low", "high")]


def has_interval(quantity: dict[str, Any]) -> bool:
    """Whether a quantity has been given an interval for any model."""
    return any("low" in each for each in quantity["models"].values())


def aside(index: int, count: int, width: float = 0.8) -> float:
    """How far one of several stands from the middle of their place."""
    return width * ((index + 0.5) / count - 0.5)


def ticked(axis: Axis, most: int) -> None:
    """At most so many ticks on a linear axis."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=STEPS))
    axis.set_major_formatter(lambda value, _: plain(value))


def readable(axis: Axis, values: Iterable[float], threshold: float | None) -> None:
    """
    A linear axis where that shows all values, else one that is logarithmic beyond a threshold, on both sides of zero.

    Args:
        axis: Whose scale is set.
        values: All that are drawn.
        threshold: Least number that the eye must tell from zero; `None` if all are above it, for a logarithmic axis.
    """
    from matplotlib.ticker import LogLocator, NullLocator, SymmetricalLogLocator

    finite = [each for each in values if math.isfinite(each)]
    sizes = sorted(abs(each) for each in finite if each) or [0.0]
    axes, is_x = axis.axes, axis is axis.axes.xaxis
    if threshold is None:
        (axes.set_xscale if is_x else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(numticks=MOST_TICKS))
    elif sizes[-1] <= max(LINEAR * threshold, ALIKE * sizes[len(sizes) // 10]):
        return ticked(axis, MOST_TICKS - 2)
    else:
        (axes.set_xscale if is_x else axes.set_yscale)("symlog", linthresh=threshold)
        locator = SymmetricalLogLocator(base=10, linthresh=threshold)
        locator.set_params(numticks=MOST_TICKS)
        axis.set_major_locator(locator)
        # A little beyond what is drawn, and on both sides of zero.
        ends = min([-0.15 * threshold, *finite]), max([0.15 * threshold, *finite])
        (axes.set_xlim if is_x else axes.set_ylim)(*(1.3 * end for end in ends))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: plain(value))


def panels(picture: Figure, count: int, rows: int) -> list[Axes]:
    """Axes below each other, each with rows for the models."""
    picture.set_size_inches(WIDTH, count * (0.45 + 0.21 * rows))
    return list(picture.subplots(count, 1, squeeze=False)[:, 0])


def finish(axes: Axes, title: str, rows: int) -> None:
    """Give a panel its heading and few ticks, with the first model on top."""
    axes.set_title("\n".join(textwrap.wrap(title, LETTERS)), loc="left")
    axes.set_yticks([])
    axes.spines.left.set_visible(False)
    axes.set_ylim(rows - 0.5, -0.7)
    ticked(axes.xaxis, 6)


def draw_intervals(picture: Figure, task: dict[str, Any], names: dict[str, str]) -> str:
    """The numbers that have intervals, each on an axis of its own: they have nothing in common."""
    quantities = [each for each in task["quantities"] if has_interval(each)]
    for axes, quantity in zip(panels(picture, len(quantities), len(names)), quantities, strict=True):
        for place, (name, colour) in enumerate(names.items()):
            entry = quantity["models"].get(name)
            value = number((entry or {"value": None})["value"])
            axes.plot(interval(entry), [place, place], "|-", color=colour, markersize=7)
            axes.plot([value], [place], "o", markersize=5, color=colour, label=name)
            if math.isfinite(value):
                text, where = shown(value, quantity["unit"]), (value, place)
                axes.annotate(text, where, (0, 4), textcoords="offset points", ha="center", fontsize=7)
        axes.margins(x=0.12)
        finish(axes, f"{quantity['name']} ({quantity['unit']})" if quantity["unit"] else quantity["name"], len(names))
    return IN_TABLE
