"""Pictures of results, as SVG that stands in a page."""

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from .tables import number as shown


# The model, and the baseline in grey: distinct for everybody, and neither is a colour that means better or worse.
COLOURS = ("#0072B2", "#868686")
# One for each frame or dtype.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
# Inches. Stretched over the column of the page its letters are those of the text, and can still be read on a phone.
WIDTH, LETTERS, LINE = 5.8, 84, 0.19
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # A model's name may have a dollar in it.
    "text.parse_math": False,
}
# An axis is linear where nothing is larger than so many times what the eye must tell from zero, or so many times
# what nine tenths of all numbers are larger than.
LINEAR, ALIKE = 3, 10
MOST_TICKS = 8
STEPS = (1, 2, 2.5, 5, 10)
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
IN_TABLE = "The numbers stand in the table."
# Models that have a result, and the colour of each.
Names = dict[str, str]
# What a picture says, for those who do not see it.
Draw = Callable[[Figure, dict[str, Any], Names], str]


def _layers(picture: Figure, task: dict[str, Any], names: Names) -> str:
    """Kurtosis of the stream, layer by layer."""
    picture.set_size_inches(WIDTH, 2.3)
    axes = picture.subplots()
    drawn, said = [0.0], []
    for index, (name, colour) in enumerate(names.items()):
        stream = task["models"][name]["stream"]
        # Where models do not differ, the later line lies upon the earlier one and must leave some of it to see; and so
        # must lines and dots of the rings around them, as the first position often makes no difference.
        width, size = (1.0, 3) if index == len(names) - 1 else (2.6, 4.5)
        styles: dict[str, tuple[str, dict[str, Any]]] = {
            "all": (name, {"linewidth": width, "markersize": size}),
            "without_first": (
                f"{name}, without the first position",
                {"linestyle": ":", "linewidth": width, "markersize": size + 3, "fillstyle": "none"},
            ),
        }
        for key, (label, style) in styles.items():
            values = [number(each[key].get("per_token", {}).get("excess_kurtosis")) for each in stream]
            axes.plot(range(len(values)), values, marker="o", color=colour, label=label, **style)
            drawn += values
            said.append(f"{label}: {', '.join(map(shown, values))}.")
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    readable(axes, "y", drawn, 1)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set(xlabel="layer (0: embeddings)", ylabel="excess kurtosis per token")
    return " ".join(said)


def _rounding(picture: Figure, task: dict[str, Any], names: Names) -> str:
    """What rounding costs, scheme by scheme."""
    picture.set_size_inches(WIDTH, 2.5)
    axes = picture.subplots()
    tested = {each["name"]: each["models"] for each in task["quantities"]}
    results = {name: task["models"][name] for name in names}
    frames = list(dict.fromkeys(frame for each in results.values() for frame in each["rounded"]))
    schemes = list(
        dict.fromkeys(scheme for each in results.values() for by in each["rounded"].values() for scheme in by)
    )
    series = [(name, frame) for name, each in results.items() for frame in each["rounded"]]
    drawn = [0.0]
    for index, (name, frame) in enumerate(series):
        rounded, protocol = results[name]["rounded"], results[name].get("protocol", {})
        # Only a RiGPT has other frames than its own.
        is_converted = frame != "identity" and protocol.get("converted") is True
        called = f"{name}, converted" if is_converted else name
        label = called if len(rounded) == 1 else f"{called}, {frame}"
        # Side by side, as numbers of one function in the same frame are one.
        places = [schemes.index(each) + aside(index, len(series)) for each in rounded[frame]]
        values = [number(each["increase"]) for each in rounded[frame].values()]
        marker = MARKERS[frames.index(frame) % len(MARKERS)]
        axes.plot(places, values, marker, markersize=4, color=names[name], label=label)
        drawn += values
        for place, scheme in zip(places, rounded[frame], strict=True):
            bounds = interval(tested.get(f"loss of {scheme}, {frame}", {}).get(name))
            axes.plot([place, place], bounds, color=names[name], linewidth=1)
            drawn += bounds
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for place in range(1, len(schemes)):
        axes.axvline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)
    readable(axes, "y", drawn, 1e-3)
    axes.set_xticks(range(len(schemes)), schemes)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(schemes) - 0.5)
    axes.set(xlabel="bits of weights (W) and activations (A)", ylabel="increase of the loss (nats per token)")
    return IN_TABLE


def _speed(picture: Figure, task: dict[str, Any], names: Names) -> str:
    """Speeds as they were measured."""
    labels = {
        "prefill_tokens_per_second": "prefill (tokens per second)",
        "decode_tokens_per_second": "decoding (tokens per second)",
        "time_to_first_token": "time to the first token (seconds, less is faster)",
    }
    for axes, (key, label) in zip(panels(picture, len(labels), len(names)), labels.items(), strict=True):
        most = 0.0
        for place, (name, colour) in enumerate(names.items()):
            found = task["models"][name][key]
            value, ends = number(found["median"]), [number(found["lower"]), number(found["upper"])]
            axes.barh(place, value, 0.7, color=colour, label=name)
            axes.plot(ends, [place, place], "|-", color="black", linewidth=1, markersize=5)
            end = max((each for each in (value, *ends) if math.isfinite(each)), default=0.0)
            axes.annotate(
                shown(value), (end, place), (4, 0), textcoords="offset points", ha="left", va="center", fontsize=7.5
            )
            most = max(most, end)
        # Room for the number beyond the longest bar.
        axes.set_xlim(0, 1.15 * most or 1)
        finish(axes, label, len(names))
    return IN_TABLE


def _errors(picture: Figure, task: dict[str, Any], names: Names) -> str:
    """Gauge errors, frame by frame."""
    errors = {name: task["models"][name]["errors"] for name in names}
    frames = list(dict.fromkeys(frame for each in errors.values() for frame in each))
    picture.set_size_inches(WIDTH, 0.65 + 0.24 * len(frames))
    axes = picture.subplots()
    drawn, said = [], []
    for index, (name, colour) in enumerate(names.items()):
        dtypes = list(dict.fromkeys(dtype for each in errors[name].values() for dtype in each))
        for marker, dtype in zip(cycle(MARKERS), dtypes, strict=False):
            values = [number(each.get(dtype, {}).get("largest")) for each in errors[name].values()]
            places = [frames.index(frame) + aside(index, len(names), 0.5) for frame in errors[name]]
            label = f"{name}, {dtype}"
            axes.plot(values, places, marker, markersize=5, color=colour, label=label, fillstyle="none", clip_on=False)
            drawn += values
            listed = ", ".join(f"{frame} {shown(value)}" for frame, value in zip(errors[name], values, strict=True))
            said.append(f"{label}: {listed}.")
    positive = [each for each in drawn if each > 0]
    if 0 in drawn or not positive:
        # Some turns change nothing at all, and zero has a place on no logarithmic axis.
        readable(axes, "x", drawn, 10.0 ** math.floor(math.log10(min(positive, default=1))))
    else:
        axes.set_xscale("log")
        ticks(axes, "x", [10.0**power for power in powers(min(positive), max(positive))])
    axes.set_yticks(range(len(frames)), frames)
    axes.set_ylim(len(frames) - 0.5, -0.5)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel="max |Δlogit| / max |logit|", ylabel="frame that is turned")
    return " ".join(said)


def _values(picture: Figure, task: dict[str, Any], names: Names) -> str:
    """The numbers that have intervals, each on an axis of its own: they have nothing in common."""
    quantities = [each for each in task["quantities"] if has_interval(each)]
    for axes, quantity in zip(panels(picture, len(quantities), len(names)), quantities, strict=True):
        for place, (name, colour) in enumerate(names.items()):
            entry = quantity["models"].get(name)
            value = number((entry or {"value": None})["value"])
            axes.plot(interval(entry), [place, place], "|-", color=colour, markersize=7)
            axes.plot([value], [place], "o", markersize=5, color=colour, label=name)
            if math.isfinite(value):
                axes.annotate(
                    shown(value, quantity["unit"]),
                    (value, place),
                    (0, 4),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
        axes.margins(x=0.12)
        finish(axes, f"{quantity['name']} ({quantity['unit']})" if quantity["unit"] else quantity["name"], len(names))
    return IN_TABLE


INTERVALS = "what was measured, with intervals of 95 %"
DRAWINGS: dict[str, tuple[str, Draw]] = {
    "perplexity": (INTERVALS, _values),
    "cloze": (INTERVALS, _values),
    "multiple_choice": (INTERVALS, _values),
    "lm-eval": (INTERVALS, _values),
    "invariance": ("what a random turn of a frame changes, the largest of all draws", _errors),
    "outliers": ("excess kurtosis of the stream, layer by layer", _layers),
    "quantization_robustness": ("what rounding costs, with intervals of 95 %; below zero it was a gain", _rounding),
    "throughput": ("medians, and the quartiles around them", _speed),
}


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


def panels(picture: Figure, count: int, rows: int) -> list[Axes]:
    """Axes below each other, each with rows for the models."""
    picture.set_size_inches(WIDTH, count * (0.45 + 0.21 * rows))
    return list(picture.subplots(count, 1, squeeze=False)[:, 0])


def finish(axes: Axes, title: str, rows: int) -> None:
    """What panels have in common: a heading, the first model on top, and few ticks."""
    axes.set_title("\n".join(textwrap.wrap(title, LETTERS)), loc="left")
    axes.set_yticks([])
    axes.spines.left.set_visible(False)
    axes.set_ylim(rows - 0.5, -0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.xaxis.set_major_formatter(lambda value, _: plain(value))


def readable(axes: Axes, which: str, values: Iterable[float], threshold: float) -> None:
    """
    A linear axis where that shows all values, else one that is logarithmic beyond a threshold, on both sides of zero.

    Args:
        axes: Whose.
        which: `"x"` or `"y"`.
        values: All that are drawn.
        threshold: Least number that the eye must tell from zero.
    """
    finite = [each for each in values if math.isfinite(each)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    sizes = sorted(abs(each) for each in finite if each) or [0.0]
    if sizes[-1] <= max(LINEAR * threshold, ALIKE * sizes[len(sizes) // 10]):
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(MaxNLocator(MOST_TICKS - 2, steps=STEPS))
        axis.set_major_formatter(lambda value, _: plain(value))
        return
    getattr(axes, f"set_{which}scale")("symlog", linthresh=threshold)
    up = [10.0**power for power in powers(threshold, high)] if high >= threshold else []
    # What reaches far enough below zero that a reader asks how far.
    down = [-(10.0**power) for power in powers(threshold, -low)] if -low >= threshold / 2 else []
    ticks(axes, which, [*reversed(down), 0.0, *up])
    # As far as the ticks, and a little beyond what is drawn.
    bottom, top = min([low, *down]), max([high, *up])
    getattr(axes, f"set_{which}lim")(min(1.3 * bottom, -0.2 * threshold), max(1.3 * top, 0.2 * threshold))


def powers(low: float, high: float) -> list[int]:
    """Powers of ten from one number to another, not too many of them."""
    first, last = math.floor(math.log10(low) + 1e-9), math.floor(math.log10(max(high, low)) + 1e-9)
    return list(range(first, last + 1, math.ceil((last - first + 1) / MOST_TICKS)))


def ticks(axes: Axes, which: str, places: Sequence[float]) -> None:
    """Ticks at these places and nowhere else."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: plain(value))


def plain(value: float) -> str:
    """A tick as it would be written by hand."""
    if value == 0 or 1e-4 < abs(value) < 1e6:
        # What arithmetic leaves of 0.1 + 0.2 is no digit of a tick.
        return f"{round(value, 10):,.7g}".replace("-", "−")
    digits, power = f"{value:.3e}".split("e")
    factor = "" if float(digits) in (1, -1) else f"{abs(float(digits)):g}·"
    return f"{'−' if value < 0 else ''}{factor}10{str(int(power)).translate(SUPERSCRIPTS)}"


def explain(picture: Figure, models: int) -> None:
    """One legend for all axes, outside of them: nothing that was measured lies beneath it; a column for each model."""
    handles = {
        label: handle
        for axes in reversed(picture.axes)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if not handles:
        return
    first = [label for label in picture.axes[0].get_legend_handles_labels()[1] if label in handles]
    labels = list(dict.fromkeys([*first, *handles]))
    fitting = LETTERS // (max(map(len, labels)) + 8)
    columns = models if 1 < models <= fitting < len(labels) else max(1, min(fitting, len(labels)))
    wrapped = ["\n".join(textwrap.wrap(label, LETTERS)) for label in labels]
    lines = math.ceil(len(labels) / columns) * max(1 + label.count("\n") for label in wrapped)
    # The picture grows, so that what was measured keeps its room.
    picture.set_figheight(picture.get_figheight() + LINE * (lines + 1))
    picture.legend([handles[label] for label in labels], wrapped, loc="outside upper left", ncols=columns)


def drawn(task: dict[str, Any], models: list[str]) -> tuple[str, str, Figure] | None:
    """
    The picture of one task: its title, what it says in words, and itself; `None` where there is nothing to draw.

    Args:
        task (`dict`): An entry of the results.
        models (`list[str]`): All models of the results, so that each has its colour in all pictures.
    """
    colours = dict(zip(models, COLOURS, strict=False))
    names = {name: colours[name] for name in task["models"]}
    title, draw = DRAWINGS[task["metric"]]
    if not names or (draw is _values and not any(map(has_interval, task["quantities"]))):
        return None
    with mpl.rc_context(STYLE):
        picture = Figure(layout="constrained")
        words = draw(picture, task, names)
        explain(picture, len(names))
    return title, words, picture


def figure(task: dict[str, Any], models: list[str]) -> tuple[str, str] | None:
    """The title and the SVG of [`drawn`], as wide as where it stands."""
    found = drawn(task, models)
    if found is None:
        return None
    title, words, picture = found
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": task["task"]}):
        # None of what a file says about itself, such as when it was made.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.savefig(buffer, format="svg", metadata=nothing)
    # Only the element itself: declarations of a file have no place inside of a page.
    opening, rest = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL).split(">", 1)
    label = escape(f"{task['task']}: {title}")
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    opening += f' width="100%" role="img" aria-label="{label}"><title>{label}</title><desc>{escape(words)}</desc>'
    # Several stand in one page, in which a name is given once.
    prefix = f"p{hashlib.sha256(task['task'].encode()).hexdigest()[:8]}-"
    return title, opening + re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", rest)
