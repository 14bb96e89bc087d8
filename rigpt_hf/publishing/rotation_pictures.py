"""Pictures of a [`View`]: probabilities of the next token, hidden states of a layer, and how far each layer moved."""

from typing import Any

import torch
from matplotlib.figure import Figure

from .rotation_view import Pair, View


INVARIANT, STOCK = "#1b6ca8", "#c8553d"
SHOWN_TOKENS, SHOWN_POSITIONS, SHOWN_DIMENSIONS = 10, 24, 64
DPI = 110
ROUNDING = 2.0**-24  # half a unit in the last place of a float32 near 1


def draw_probabilities(view: View, tokenizer: Any) -> Figure:
    """For each model the next tokens that are likeliest in its own frame, there and in the turned frame."""
    figure = Figure(figsize=(11, 4.2), dpi=DPI, layout="constrained")
    for panel, pair, color in zip(figure.subplots(1, 2), (view.rigpt, view.stock), (INVARIANT, STOCK), strict=True):
        best = likeliest(pair.before.probabilities)
        before, now = (state.probabilities[best].tolist() for state in (pair.before, pair.now))
        rows = range(len(best))
        panel.barh([row - 0.2 for row in rows], before, height=0.38, color="0.75", label="before")
        panel.barh([row + 0.2 for row in rows], now, height=0.38, color=color, label="now")
        panel.set_yticks(list(rows), [plain(tokenizer.decode([index])) for index in best.tolist()])
        panel.invert_yaxis()
        # A scale that stays when the angle changes, with room for what may grow.
        panel.set_xlim(0, min(1.0, 1.5 * max(before)))
        panel.set_title(pair.name, color=color, fontweight="bold")
        panel.set_xlabel("probability of the next token")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="lower right")
    return figure


def draw_layer(view: View, layer: int) -> Figure:
    """
    Coordinates of the hidden states after a layer (0: the embeddings), of both models, before and now.

    Raises:
        ValueError: if there is no such layer.
    """
    last = min(len(pair.before.hidden_states) for pair in (view.rigpt, view.stock)) - 1
    if not 0 <= layer <= last:
        raise ValueError(f"`layer` must be between 0 (the embeddings) and {last}, got {layer}.")
    figure = Figure(figsize=(11, 4.6), dpi=DPI, layout="constrained")
    for column, (pair, color) in enumerate(((view.rigpt, INVARIANT), (view.stock, STOCK))):
        pictures = layer_pictures(pair, layer)
        # Of the frame it started in, so that the scale stays; a few large coordinates would leave the rest white.
        scale = pictures[0].abs().flatten().quantile(0.97).item() or 1.0
        for row, (picture, when) in enumerate(zip(pictures, ("before", "now"), strict=True)):
            panel = figure.add_subplot(2, 2, 2 * row + column + 1)
            panel.imshow(picture.numpy(), cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
            panel.set_title(f"{pair.name}, {when}", color=color, fontsize=10)
            positions = range(len(picture))
            shown = [plain(token) for token in view.tokens[: len(picture)]]
            panel.set_yticks(list(positions), shown, fontsize=max(4, min(8, 90 // len(picture))))
            panel.tick_params(axis="y", length=0)
            if row:
                panel.set_xlabel(f"first {picture.shape[1]} of {pair.before.hidden_states.shape[-1]} coordinates")
            else:
                panel.set_xticks([])
    return figure


def draw_layers(view: View) -> Figure:
    """Left: how far the hidden states of every layer moved. Right: how far from where the rotation brings them."""
    figure = Figure(figsize=(11, 3.0), dpi=DPI, layout="constrained")
    moved, astray = figure.subplots(1, 2)
    for pair, color in ((view.stock, STOCK), (view.rigpt, INVARIANT)):
        style = {"color": color, "label": pair.name, "marker": "o", "markersize": 4}
        moved.plot(pair.changes, **style)
        astray.plot([max(value, ROUNDING) for value in pair.departures], **style)
    moved.set_ylim(0, 2.05)
    moved.set(title="How far hidden states moved", ylabel="|now − before| / |before|")
    astray.set_yscale("log")
    astray.set_ylim(ROUNDING / 2, 10)
    astray.set(title="How far from simply turned along", ylabel="|now − R·before| / |before|")
    for panel in (moved, astray):
        panel.set_xlabel("layer (0: embeddings)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="best")
    return figure


def layer_pictures(pair: Pair, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The shown part `[tokens, coordinates]` of a layer's hidden states, before and now."""
    before, now = (
        state.hidden_states[layer, :SHOWN_POSITIONS, :SHOWN_DIMENSIONS].float() for state in (pair.before, pair.now)
    )
    return before, now


def likeliest(probabilities: torch.Tensor) -> torch.Tensor:
    """Ids of the ten likeliest tokens, or of all where there are fewer."""
    return probabilities.topk(min(SHOWN_TOKENS, len(probabilities))).indices


def plain(token: str) -> str:
    """A token as a label: with its spaces to be seen, and nothing in it taken for a formula."""
    return repr(token)[1:-1].replace(" ", "·").replace("$", r"\$")
