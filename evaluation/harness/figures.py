"""Pictures of results, as SVG that stands in a page."""

import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


# Distinct for people who do not tell red from green (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00")
STYLES = {"identity": "-", "haar": "--", "hadamard": ":", "pca": "-."}
SIZE = (6.4, 3.6)
# Models that have a result, and the colour of each.
Names = dict[str, str]
Draw = Callable[[Axes, dict[str, Any], Names], None]


def _layers(axes: Axes, task: dict[str, Any], names: Names) -> None:
    """Kurtosis of the stream, layer by layer."""
    for name, colour in names.items():
        stream = task["models"][name]["stream"]
        for key, style, label in (("all", "-", name), ("without_first", ":", f"{name}, without the first position")):
            values = [number(each[key].get("per_token", {}).get("excess_kurtosis")) for each in stream]
            axes.plot(range(len(values)), values, style, marker="o", markersize=3, color=colour, label=label)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="layer (0: embeddings)", ylabel="excess kurtosis per token")


def _rounding(axes: Axes, task: dict[str, Any], names: Names) -> None:
    """What rounding costs, scheme by scheme."""
    for name, colour in names.items():
        result = task["models"][name]
        for frame, schemes in result["rounded"].items():
            values = [max(number(each["increase"]), 0) for each in schemes.values()]
            # Only a RiGPT has other frames than its own.
            is_converted = frame != "identity" and result["protocol"].get("converted") is True
            called = f"{name}, converted" if is_converted else name
            label = called if len(result["rounded"]) == 1 else f"{called}, {frame}"
            axes.plot(list(schemes), values, STYLES[frame], marker="o", markersize=4, color=colour, label=label)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="bits of weights and activations", ylabel="increase of the loss (nats per token)")


def _speed(axes: Axes, task: dict[str, Any], names: Names) -> None:
    """Speeds relative to the last model's."""
    labels = {"prefill_tokens_per_second": "prefill", "decode_tokens_per_second": "decoding"}
    last_name = list(names)[-1]
    last = task["models"][last_name]
    for index, (name, colour) in enumerate(names.items()):
        places = [place + 0.8 * index / len(names) for place in range(len(labels))]
        values = [task["models"][name][key]["median"] / last[key]["median"] for key in labels]
        bounds = [
            [
                abs(task["models"][name][key][end] / last[key]["median"] - value)
                for key, value in zip(labels, values, strict=True)
            ]
            for end in ("lower", "upper")
        ]
        axes.bar(places, values, 0.36, yerr=bounds, capsize=4, color=colour, label=name)
    axes.set_xticks([place + 0.2 * (len(names) - 1) for place in range(len(labels))], list(labels.values()))
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set(ylabel=f"speed, {last_name} = 1")


def _errors(axes: Axes, task: dict[str, Any], names: Names) -> None:
    """Gauge errors, frame by frame."""
    markers = ("o", "s", "^", "D")
    for name, colour in names.items():
        errors = task["models"][name]["errors"]
        for marker, dtype in zip(markers, next(iter(errors.values())), strict=False):
            values = [number(each[dtype]["largest"]) for each in errors.values()]
            axes.plot(list(errors), values, marker, color=colour, label=f"{name}, {dtype}", fillstyle="none")
    axes.set_yscale("log")
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(ylabel="max |Δlogit| / max |logit|")


def _values(axes: Axes, task: dict[str, Any], names: Names) -> None:
    """The numbers that were tested, with their intervals."""
    tested = [each for each in task["quantities"] if any("low" in value for value in each["models"].values())]
    for index, name in enumerate(names):
        shown = [(place, each["models"][name]) for place, each in enumerate(tested) if name in each["models"]]
        places = [place + 0.2 * index for place, _ in shown]
        values = [number(each["value"]) for _, each in shown]
        bounds = [
            [abs(number(each["value"]) - number(each.get(end, each["value"]))) for _, each in shown]
            for end in ("low", "high")
        ]
        axes.errorbar(values, places, xerr=bounds, fmt="o", capsize=4, color=names[name], label=name)
    axes.set_yticks(
        [place + 0.1 * (len(names) - 1) for place in range(len(tested))], [each["name"] for each in tested]
    )
    axes.margins(y=0.4)
    axes.invert_yaxis()


DRAWINGS: dict[str, tuple[str, Draw]] = {
    "perplexity": ("with 95 % intervals", _values),
    "cloze": ("with 95 % intervals", _values),
    "multiple_choice": ("with 95 % intervals", _values),
    "lm-eval": ("with 95 % intervals", _values),
    "invariance": ("what a random turn of a frame changes", _errors),
    "outliers": ("excess kurtosis of the stream, layer by layer", _layers),
    "quantization_robustness": ("what rounding costs", _rounding),
    "throughput": ("with quartiles", _speed),
}


def number(value: float | None) -> float:
    """A number that a picture leaves out if there is none."""
    return math.nan if value is None else value


def figure(task: dict[str, Any], models: list[str]) -> tuple[str, str] | None:
    """
    The picture of one task: its title and its SVG; `None` where there is nothing to draw.

    Args:
        task (`dict`): An entry of the results.
        models (`list[str]`): All models of the results, so that each has its colour in all pictures.
    """
    colours = dict(zip(models, COLOURS, strict=False))
    names = {name: colours[name] for name in task["models"]}
    title, draw = DRAWINGS[task["metric"]]
    if not names or (
        draw is _values and not any("low" in v for q in task["quantities"] for v in q["models"].values())
    ):
        return None
    with mpl.rc_context(
        {"svg.hashsalt": task["task"], "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        # A row for every number that is listed; other pictures have one height.
        height = 1.2 + 0.5 * len(task["quantities"]) if draw is _values else SIZE[1]
        picture = Figure(figsize=(SIZE[0], height), layout="constrained")
        axes = picture.subplots()
        draw(axes, task, names)
        axes.legend(fontsize=8, frameon=False)
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", metadata={"Date": None})
    # Only the element itself: declarations of a file have no place inside of a page.
    drawing = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    return title, drawing
