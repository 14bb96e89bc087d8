"""All differences of a run at a glance: a row for each, its interval, and what it is worth."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..drawing import STEPS, number
from ..measures.quantization_robustness import ADDED
from ..numbers import plain
from .tables import converted, measure_of, tested, verdict


# With more rows than this nobody glances; what shows no difference is then one row of each panel.
MOST = 30
# Half an axis is at least so long, lest noise of arithmetic fill it.
LEAST = 1.0
LEAST_ABSOLUTE = 0.01
NONE = "no difference shown"
# Ticks of an axis.
TICKS = 6


@dataclass(frozen=True)
class Row:
    """
    A difference to the baseline.

    Args:
        task, name (`str`): What it is.
        verdict (`str`): What it is worth.
        text, bounds (`str`): The difference as measured, and its interval.
        value, low, high (*optional*): Where they stand, in percent of the width; better is right.
    """

    task: str
    name: str
    verdict: str
    text: str
    bounds: str
    value: float | None
    low: float | None
    high: float | None

    @property
    def kind(self) -> str:
        """A class of the style sheet."""
        return {NONE: "none", "better": "better", "worse": "worse"}.get(self.verdict, "other")


@dataclass(frozen=True)
class Panel:
    """
    Differences on one axis.

    Args:
        title (`str`): In which unit.
        is_directed (`bool`): Whether right is better, or merely more.
        rows (`list[Row]`): From top to bottom, those of a task together.
        ticks (`list[tuple[float, str]]`): Where they stand, in percent of the width, and how far from the baseline.
        zero (`float`): Where the baseline stands.
    """

    title: str
    is_directed: bool
    rows: list[Row]
    ticks: list[tuple[float, str]]
    zero: float

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """The rows of each task."""
        for task in dict.fromkeys(row.task for row in self.rows):
            yield task, [row for row in self.rows if row.task == task]


@dataclass(frozen=True)
class _Measured:
    """A difference in the unit of its panel, signed as it was measured, and which side of the axis is better."""

    task: str
    name: str
    verdict: str
    unit: str
    better: str
    value: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """The sign that turns the better side to the right."""
        return -1 if self.better == "less" else 1


@dataclass(frozen=True)
class _Scale:
    """An axis from one number to another."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """In percent of the width."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    @property
    def decimals(self) -> int:
        """A thousandth of the axis is nothing to see, and mostly arithmetic."""
        return max(0, 3 - math.ceil(math.log10(self.high - self.low)))


def overview(results: dict[str, Any]) -> list[Panel]:
    """The tested differences, a panel for each unit; nothing where a model stands alone."""
    differences = [_measured(task, quantity, results["baseline"]) for task, quantity in tested(results["tasks"])]
    by_panel: dict[tuple[str, bool], list[_Measured]] = {}
    for difference in differences:
        by_panel.setdefault((difference.unit, bool(difference.better)), []).append(difference)
    return [_panel(*key, rows, len(differences) > MOST) for key, rows in by_panel.items()]


def _measured(task: dict[str, Any], quantity: dict[str, Any], baseline: str) -> _Measured:
    difference = quantity["difference"]
    value, low, high = (number(difference[key]) for key in ("value", "low", "high"))
    # In frames that a model has only as its conversion, its number is that of another model.
    name = measure_of(task).words(quantity["name"]).removeprefix(ADDED) + ("*" if converted(task, quantity) else "")
    own = quantity["models"][baseline]["value"]
    better, percent = quantity["better"], f"in percent of {baseline}'s"
    told_in = measure_of(task).difference_in(quantity)
    if difference["kind"] != "difference":
        # The ratio is one of speeds; where the quantity is a time, its own ratio is the inverse.
        unit = percent
        if better == "less":
            value, low, high = 1 / value, 1 / high, 1 / low
        else:
            better = "more"
        value, low, high = (100 * (end - 1) for end in (value, low, high))
    elif told_in == "points":
        unit = "in percentage points"
        value, low, high = (100 * end for end in (value, low, high))
    elif told_in == "unit" or not own:
        unit = f"in {quantity['unit']}" if quantity["unit"] else "as measured"
    else:
        unit = percent
        value, low, high = (100 * end / abs(own) for end in (value, low, high))
    return _Measured(task["task"], name, verdict(quantity), unit, better, value, low, high)


def _panel(unit: str, is_directed: bool, measured: list[_Measured], is_long: bool) -> Panel:
    ends = [
        difference.side * end
        for difference in measured
        for end in (difference.value, difference.low, difference.high)
        if math.isfinite(end)
    ]
    least = (LEAST if "percent" in unit else LEAST_ABSOLUTE) / 2
    low, high = min([-least, *ends]), max([least, *ends])
    room = 0.04 * (high - low)
    scale = _Scale(low - room, high + room)
    suffix = " %" if "percent of" in unit else ""
    hidden = [difference for difference in measured if is_long and difference.verdict == NONE]
    rows = [_row(difference, scale, suffix) for difference in measured if difference not in hidden]
    if hidden:
        sides = [
            difference.side * end
            for difference in hidden
            for end in (difference.low, difference.high)
            if math.isfinite(end)
        ]
        bounds = (scale.place(min(sides)), scale.place(max(sides))) if sides else (None, None)
        rows.append(Row("Others", f"{len(hidden)} more, from end to end", NONE, "", "", None, *bounds))
    from matplotlib.ticker import MaxNLocator

    places = MaxNLocator(TICKS, steps=STEPS).tick_values(scale.low, scale.high)
    # On both sides the distance: which of them is better is said above.
    ticks = [
        (scale.place(tick), plain(abs(tick) if is_directed else tick))
        for tick in map(float, places)
        if scale.low <= tick <= scale.high
    ]
    return Panel(unit, is_directed, rows, ticks, scale.place(0))


def _row(difference: _Measured, scale: _Scale, suffix: str) -> Row:
    value, *texts = (_amount(end, scale.decimals) for end in (difference.value, difference.low, difference.high))
    value += suffix if value.startswith(("+", "−")) else ""
    # An interval of nothing says no more than the number.
    between = "" if {*texts} <= {"0", "≈ 0", "–"} else " to ".join(texts)
    middle = scale.place(difference.side * difference.value) if math.isfinite(difference.value) else None
    if not (math.isfinite(difference.low) and math.isfinite(difference.high)):
        return Row(difference.task, difference.name, difference.verdict, value, between, middle, None, None)
    low, high = sorted(scale.place(difference.side * end) for end in (difference.low, difference.high))
    return Row(difference.task, difference.name, difference.verdict, value, between, middle, low, high)


def _amount(value: float, decimals: int) -> str:
    """A difference as measured, with its sign."""
    if not math.isfinite(value):
        return "–"
    if round(value, decimals) == 0:
        return "≈ 0" if value else "0"
    return f"{value:+,.{decimals}f}".replace("-", "−")
