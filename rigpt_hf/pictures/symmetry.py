"""Two models compared, the loss between them, charges under gradient descent, and a symmetry of the data learned."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..symmetry.comparison import Comparison, Part
from ..symmetry.drift import ROUNDING, DriftReport
from ..symmetry.merging import LossPath
from ..symmetry.rates import related
from .style import BLUE, GREEN, ORANGE, Figure, figure, picture


@picture
def plot_comparison(comparison: Comparison, title: str = "") -> Figure:
    """
    Distances per part of the network on a logarithmic scale, or, where nothing was searched for, those of the
    fingerprints per layer; the title says the verdict.
    """
    parts = comparison.parts
    made, (panel,) = figure(width=max(7.0, 0.28 * len(parts or comparison.layers_apart) + 3), height=4.5)
    if parts:
        _draw_parts(panel, parts)
    else:
        panel.bar(range(len(comparison.layers_apart)), comparison.layers_apart, color=BLUE, label="fingerprints")
        panel.axhline(related(), color=ORANGE, label="relatives below")
        panel.set(xlabel="layer", ylabel="distance", ylim=(0, None))
    words = f"{title}: {comparison.meaning}" if title else comparison.meaning
    panel.set_title(textwrap.fill(words, 80), parse_math=False)
    made.legend(loc="outside lower center", ncols=4)
    return made


def _draw_parts(panel: Any, parts: Sequence[Part]) -> None:
    """The distance left in every part, beside the distance before and what rounding explains."""
    places = list(range(len(parts)))
    smallest = min(
        [part.distance for part in parts if part.distance] + [part.rounding for part in parts if part.rounding] + [1.0]
    )
    panel.bar(places, [max(part.distance, smallest) for part in parts], color=BLUE, label="aligned")
    panel.plot(places, [part.before for part in parts], "o", color="0.6", ms=4, label="unaligned")
    values = [part.rounding for part in parts]
    if all(value is not None for value in values):
        panel.plot(places, values, "_", color=GREEN, ms=12, mew=2, label="explained by rounding")
    names = [part.name.replace("layers.", "") for part in parts]
    panel.set_xticks(places, names, rotation=90, fontsize=7)
    panel.set(yscale="log", ylabel="relative distance")


@picture
def plot_paths(paths: Sequence[LossPath], title: str = "The way from one model to the other") -> Figure:
    """Losses on one or several ways between two models, before and after alignment."""
    made, (panel,) = figure(width=6.5, height=4.2)
    for index, path in enumerate(paths):
        lines = (
            (path.before, ORANGE, "unaligned"),
            (path.after, BLUE, "aligned"),
            (path.learned, GREEN, "learned on text"),
        )
        for losses, colour, words in lines:
            if losses is not None:
                panel.plot(path.t, losses, color=colour, alpha=0.8, label=None if index else words)
    panel.set(xlabel="share of model A", ylabel="loss in nats per token", title=title)
    panel.legend()
    return made


@picture
def plot_drift(report: DriftReport) -> Figure:
    """
    The drift of charges at the end against the step size beside a line of order 1, and, with weight decay, what is
    kept of the charges along time beside the predicted exponentials.
    """
    decays = report.weight_decay > 0
    made, panels = figure(2 if decays else 1, width=5.5, height=4.4)
    _draw_drift(panels[0], report)
    if decays:
        _draw_decay(panels[1], report)
    for panel in panels:
        panel.legend()
    return made


def _draw_drift(panel: Any, report: DriftReport) -> None:
    rates = [descent.learning_rate for descent in report.descents]
    top = 0.0
    for kind, order in report.orders.items():
        drifts = [descent.drift[kind][-1] for descent in report.descents]
        if min(drifts) < ROUNDING:
            continue
        panel.loglog(rates, drifts, "o-", label=kind if math.isnan(order) else f"{kind}, order {order:.2f}")
        top = max(top, drifts[0])
    if top:
        panel.loglog(rates, [2 * top * rate / rates[0] for rate in rates], ":", color="0.5", label="order 1")
    panel.set(
        title="Charges under gradient descent",
        xlabel="step size η",
        ylabel=f"drift at time {report.time:g} / Σ|W|²",
    )


def _draw_decay(panel: Any, report: DriftReport) -> None:
    descent = report.descents[-1]
    # Charges of one rate lie on top of each other: rings of different sizes let all of them be seen.
    for index, (kind, kept) in enumerate(descent.kept.items()):
        if not any(math.isnan(value) for value in kept):
            sizes = {"ms": 4 + 3 * index, "mfc": "none"}
            panel.semilogy(descent.times, [abs(value) for value in kept], "o", label=kind, **sizes)
    for rate, style in zip(sorted(set(report.predicted_rates.values())), ("-", "--"), strict=False):
        power = round(rate / report.weight_decay)
        label = f"exp(-{power if power > 1 else ''}μt)"
        panel.semilogy(descent.times, [math.exp(-rate * t) for t in descent.times], style, color="0.5", label=label)
    panel.set(
        title=f"Weight decay μ = {report.weight_decay:g}, η = {descent.learning_rate:g}",
        xlabel="time",
        ylabel="<Q(t), Q(0)> / |Q(0)|²",
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
