"""Two models compared, the loss between them, charges under gradient descent, and a symmetry of the data learned."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from ..symmetry.comparison import Comparison, Part
from ..symmetry.drift import ROUNDING, DriftReport
from ..symmetry.merging import LossPath
from ..symmetry.rates import related
from .style import BLACK, BLUE, COLOURS, GREEN, ORANGE, Figure, figure, picture


# Bars that can be told apart on a page of 700 pixels, and names of layers below an axis.
BARS, TICKS = 12, 10
# Letters of a name at an end of a path, and of one that has a line for itself.
LETTERS, PATH = 32, 72
# What the frames turn, where a legend names them.
KINDS = {
    "stream": "hidden space",
    "entry": "hidden space at the entry",
    "local": "hidden space of each layer",
    "lexical": "token embeddings",
    "output": "output embeddings",
    "gains": "gains of the query and key norms",
    "head_qk": "queries and keys of heads",
    "query_norm": "normalized queries",
    "key_norm": "normalized keys",
    "head_vo": "values and outputs of heads",
    "neurons": "neurons",
    "expert_neurons": "neurons of experts",
    "shared_neurons": "neurons of shared experts",
    "key_shift": "shifts of keys",
    "value_shift": "shifts of values",
    "residual_shift": "shifts of the hidden space",
    "router_shift": "shifts of the router",
    "router_bias_shift": "shifts of the router's biases",
    "position_shift": "shifts of positions",
}
# An order or a rate that is no further from the predicted one, as a share of it, is as predicted.
NEAR = 0.25


@picture
def plot_comparison(comparison: Comparison, names: tuple[str, str] | None = None) -> Figure:
    """
    Distances per part of the network on a logarithmic scale, or, where nothing was searched for, those of the
    fingerprints per layer; the title says the verdict.

    Args:
        comparison: What was found.
        names: Of A and of B, of which the verdict speaks.
    """
    made, (panel,) = figure(title=comparison.meaning, width=7.0, height=4.8)
    if comparison.parts:
        if len(comparison.parts) <= BARS:
            _draw_parts(panel, comparison.parts)
        else:
            _draw_depth(panel, comparison.parts)
        _draw_scale(panel, comparison)
    else:
        panel.bar(range(len(comparison.layers_apart)), comparison.layers_apart, color=BLUE, label="fingerprints")
        panel.axhline(related(), color=ORANGE, label="relatives below")
        panel.set(xlabel="layer", ylabel="distance", ylim=(0, None))
        panel.xaxis.get_major_locator().set_params(integer=True)
    if names is not None:
        words = "\n".join(f"{letter}: {_end(name, PATH)}" for letter, name in zip("AB", names, strict=True))
        panel.set_title(words, loc="left", fontsize=9, parse_math=False)
    made.legend(loc="outside lower center", ncols=4)
    return made


def _draw_parts(panel: Any, parts: Sequence[Part]) -> None:
    """The distance left in every part as a bar, beside the distance before and what rounding explains."""
    places = list(range(len(parts)))
    panel.bar(places, [part.distance for part in parts], color=BLUE, label="aligned")
    _draw_beside(panel, places, parts)
    names = [part.name.replace("layers.", "") for part in parts]
    panel.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")


def _draw_beside(panel: Any, places: Sequence[int], parts: Sequence[Part]) -> None:
    panel.plot(places, [part.before for part in parts], "o", color="0.6", ms=4, label="unaligned")
    if all(part.rounding is not None for part in parts):
        values = [part.rounding for part in parts]
        panel.plot(places, values, "_", color=GREEN, ms=12, mew=2, label="explained by rounding")


def _draw_depth(panel: Any, parts: Sequence[Part]) -> None:
    """The distances left over the depth, a line for each kind of part; what is in no layer stands before the first."""
    lines: dict[str, dict[int, Part]] = {}
    outside = [part for part in parts if not part.name.startswith("layers.")]
    # Far enough from each other for their names.
    step = max(1, len(parts) // 24)
    places = {part.name: step * (index - len(outside)) for index, part in enumerate(outside)}
    for part in parts:
        if part.name not in places:
            _, layer, kind = part.name.split(".", 2)
            places[part.name] = int(layer)
            lines.setdefault(kind, {})[int(layer)] = part
    _draw_beside(panel, [places[part.name] for part in parts], parts)
    for colour, (kind, by_layer) in zip(cycle(COLOURS), lines.items(), strict=False):
        values = [part.distance for part in by_layer.values()]
        panel.plot(list(by_layer), values, "o-", ms=3, color=colour, label=f"aligned: {kind}")
    if outside:
        values = [part.distance for part in outside]
        panel.plot([places[part.name] for part in outside], values, "D", ms=5, color=BLACK, label="aligned: no layer")
    depth = 1 + max(places.values())
    layers = list(range(0, depth, -(-depth // TICKS)))
    panel.set_xticks([*(places[part.name] for part in outside), *layers], [*(p.name for p in outside), *layers])
    for label in panel.get_xticklabels()[: len(outside)]:
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    panel.set_xlabel("layer")


def _draw_scale(panel: Any, comparison: Comparison) -> None:
    """An axis from rounding to 1, with both in words."""
    parts = comparison.parts
    values = [value for part in parts for value in (part.distance, part.before, part.rounding) if value]
    panel.set_ylabel("relative distance")
    said = {1.0: "1: as large as\nthe weights"}
    if comparison.limit is not None:
        said[comparison.limit] = f"{comparison.limit:.2g}: up to here\nit may be rounding"
    if values:
        panel.set(yscale="log", ylim=(min([*values, *said]) / 3, 3 * max([*values, *said])))
    else:
        panel.set_ylim(0, 1.1)
        panel.text(0.5, 0.5, "all distances are 0", transform=panel.transAxes, ha="center")
    for value, words in said.items():
        panel.axhline(value, color="0.5", lw=0.8, ls=":", zorder=0)
        panel.text(1.01, value, words, transform=panel.get_yaxis_transform(), va="center", fontsize=8)


def _end(name: str, letters: int) -> str:
    """A name, or so many letters of its end, which tells paths apart."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"


@picture
def plot_paths(
    paths: Sequence[LossPath],
    title: str = "Loss on the straight path between two models",
    names: tuple[str, str] | None = None,
) -> Figure:
    """
    Losses on one or several straight paths between two models, before and after alignment.

    Args:
        paths: Each from a model B to a model A.
        title: Of the picture.
        names: Of A and of B, for the two ends.
    """
    made, (panel,) = figure(title=title, width=6.5, height=4.2)
    for index, path in enumerate(paths):
        # Of one pair thinner lines lie on thicker ones, so that all are seen where they coincide.
        lines = (
            (path.before, ORANGE, "unaligned", 5.0),
            (path.after, BLUE, "aligned", 2.0),
            (path.learned, GREEN, "learned on text", 1.0),
        )
        for losses, colour, words, width in lines:
            if losses is not None:
                panel.plot(
                    path.t,
                    losses,
                    color=colour,
                    alpha=0.8,
                    lw=width if len(paths) == 1 else 1.6,
                    label=None if index else words,
                )
    panel.set(xlabel="share of model A", ylabel="loss in nats per token")
    if names is not None:
        first, second = (_end(name, LETTERS) for name in names)
        ticks = [0, 0.25, 0.5, 0.75, 1]
        panel.set_xticks(ticks, [f"0\n{second}", *ticks[1:-1], f"1\n{first}"], parse_math=False)
        for label, side in zip(panel.get_xticklabels()[::4], ("left", "right"), strict=True):
            label.set_ha(side)
        panel.set_xlabel("share of the model on the right")
    panel.legend()
    return made


@picture
def plot_drift(report: DriftReport) -> Figure:
    """
    The drift of charges at the end against the step size beside a line of order 1, and, with weight decay, what is
    kept of the charges along time beside the predicted exponentials.
    """
    decays = report.weight_decay > 0
    made, panels = figure(2 if decays else 1, title=_drift_said(report), width=4.8 if decays else 6.5, height=4.2)
    _draw_drift(panels[0], report)
    if decays:
        _draw_decay(panels[1], report)
    for panel in panels:
        panel.legend()
    return made


def _drift_said(report: DriftReport) -> str:
    """The title: the prediction as a finding, where the measurements agree with it."""
    orders = [order for order in report.orders.values() if not math.isnan(order)]
    pairs = [(report.measured_rates[kind], rate) for kind, rate in report.predicted_rates.items()]
    told = [(measured, rate) for measured, rate in pairs if not math.isnan(measured)]
    if orders and all(abs(order - 1) <= NEAR for order in orders):
        words = "What gradient flow conserves drifts in proportion to the step of gradient descent"
    else:
        words = "Drift of what gradient flow conserves, by the step of gradient descent"
    if not report.weight_decay:
        return words
    if told and all(abs(measured - rate) <= NEAR * rate for measured, rate in told):
        return f"{words}; weight decay forgets it at the predicted rate"
    return f"{words}; and what weight decay leaves of it"


def _draw_drift(panel: Any, report: DriftReport) -> None:
    rates = [descent.learning_rate for descent in report.descents]
    top = 0.0
    for kind, order in report.orders.items():
        drifts = [descent.drift[kind][-1] for descent in report.descents]
        if min(drifts) < ROUNDING:
            continue
        words = KINDS.get(kind, kind)
        label = words if math.isnan(order) else f"{words}: power {order:.2f} of the step"
        panel.loglog(rates, drifts, "o-", label=label)
        top = max(top, drifts[0])
    if top:
        # Above what was measured, with room for the legend above it.
        panel.loglog(rates, [2 * top * rate / rates[0] for rate in rates], ":", color="0.5", label="in proportion")
        panel.set_ylim(None, 20 * top)
    panel.set(
        title=f"Drift after a time of {report.time:g}",
        xlabel="step size (learning rate)",
        ylabel="change / squared norm of the weights",
    )
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.minorticks_off()


def _draw_decay(panel: Any, report: DriftReport) -> None:
    descent = report.descents[-1]
    # Charges of one rate lie on top of each other: rings of different sizes let all of them be seen.
    for index, (kind, kept) in enumerate(descent.kept.items()):
        if not any(math.isnan(value) for value in kept):
            rings = {"ms": 4 + 3 * index, "mfc": "none"}
            panel.semilogy(descent.times, [abs(value) for value in kept], "o", label=KINDS.get(kind, kind), **rings)
    for rate, style in zip(sorted(set(report.predicted_rates.values())), ("-", "--"), strict=False):
        power = round(rate / report.weight_decay)
        label = f"predicted: exp(-{power if power > 1 else ''}μt)"
        panel.semilogy(descent.times, [math.exp(-rate * t) for t in descent.times], style, color="0.5", label=label)
    panel.set(
        title=f"Left under weight decay of rate μ = {report.weight_decay:g}\n(step size {descent.learning_rate:g})",
        xlabel="time t (steps × step size)",
        ylabel="share of the charge at the start",
    )


@picture
def draw_generalisation(curves: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Right answers over steps, as shares, by the name of the learner: dotted of familiar words, solid of the new."""
    title = "New commands that are answered right, along the training: other verbs were seen in company, jump alone"
    made, (panel,) = figure(title=title, width=6.5, height=4.2)
    # Those that answer none lie on each other, which dots of different sizes show.
    for size, colour, (name, points) in zip((9, 6, 4), (ORANGE, BLUE, GREEN), curves.items(), strict=False):
        steps, familiar, new = zip(*points, strict=True)
        panel.plot(steps, new, color=colour, lw=size / 2, marker="o", ms=size, label=f"{name}: jump")
        panel.plot(steps, familiar, color=colour, lw=1.2, ls=":", label=f"{name}: other verbs")
    panel.set(xlabel="step", ylabel="new commands answered right", ylim=(-0.03, 1.03))
    made.legend(loc="outside lower center", ncols=len(curves))
    return made
