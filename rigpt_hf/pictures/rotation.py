"""A RiGPT and a stock model whose hidden spaces turn: next tokens, hidden states, losses and logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .style import INVARIANT, STOCK, Figure, draw_image, figure, picture


if TYPE_CHECKING:
    from ..demo.report import Findings
    from ..demo.rotation import Sweep
    from ..publishing.rotation_view import Pair, View


SHOWN_TOKENS, SHOWN_POSITIONS, SHOWN_DIMENSIONS = 10, 24, 64
SHARE = "share of the rotation"
ROUNDING = 2.0**-24  # half a unit in the last place of a float32 near 1
# A total variation distance below it is not to be seen, and a departure below it is rounding.
SEEN = 1e-3


@picture
def draw_probabilities(view: "View", tokenizer: Any) -> Figure:
    """For each model the next tokens that are likeliest in its own frame, there and in the turned frame."""
    made, panels = figure(2, title=_said_of_tokens(view), width=4.6, height=4.4)
    for panel, pair, colour in zip(panels, (view.rigpt, view.stock), (INVARIANT, STOCK), strict=True):
        best = likeliest(pair.before.probabilities)
        before, now = (state.probabilities[best].tolist() for state in (pair.before, pair.now))
        draw_bars(panel, [plain(tokenizer.decode([index])) for index in best.tolist()], before, now, colour, "now")
        # A scale that stays when the angle changes, with room for what may grow.
        panel.set_xlim(0, min(1.0, 1.5 * max(before)))
        panel.set_title(pair.name, color=colour, fontweight="bold")
    return made


def _said(view: "View", still: str, words: tuple[str, str], moved: Sequence[float]) -> str:
    """
    A sentence about both models.

    Args:
        view: What is shown.
        still: The sentence where nothing is turned.
        words: Of a model that stays as it was, and of one that does not.
        moved: How far RiGPT and the stock model are from where they were.
    """
    if not view.angle:
        return still
    names = (pair.name.replace("$", r"\$") for pair in (view.rigpt, view.stock))
    said = (f"{words[value > SEEN]} {name}" for name, value in zip(names, moved, strict=True))
    return f"Turning the hidden space {' and '.join(said)}"


def _said_of_tokens(view: "View") -> str:
    words = "keeps the next tokens of", "changes the next tokens of"
    moved = [pair.distance for pair in (view.rigpt, view.stock)]
    return _said(view, "The likeliest next tokens of both models, before anything is turned", words, moved)


def _said_of_layers(view: "View") -> str:
    words = "only turns the hidden states of", "deforms the hidden states of"
    moved = [max(pair.departures) for pair in (view.rigpt, view.stock)]
    return _said(view, "Hidden states of all layers, before anything is turned", words, moved)


@picture
def draw_layer(view: "View", layer: int) -> Figure:
    """
    Coordinates of the hidden states after a layer (0: the embeddings), of both models, before and now.

    Raises:
        ValueError: if there is no such layer.
    """
    last = min(len(pair.before.hidden_states) for pair in (view.rigpt, view.stock)) - 1
    if not 0 <= layer <= last:
        raise ValueError(f"`layer` must be between 0 (the embeddings) and {last}, got {layer}.")
    place = f"after layer {layer}" if layer else "at the embeddings"
    title = f"Hidden states {place}, a row for each token: their coordinates turn in both models"
    made, panels = figure(2, 2, title=title, width=4.6, height=2.3)
    for column, (pair, colour) in enumerate(((view.rigpt, INVARIANT), (view.stock, STOCK))):
        images = layer_pictures(pair, layer)
        for panel, image, when in zip(panels[column::2], images, ("before", "now"), strict=True):
            # The scale is that of the frame it started in.
            draw_image(panel, image.numpy(), most(images[0]))
            panel.set_title(f"{pair.name}, {when}", color=colour)
            shown = [plain(token) for token in view.tokens[: len(image)]]
            panel.set_yticks(range(len(image)), shown, fontsize=max(4, min(8, 90 // len(image))))
            panel.tick_params(axis="y", length=0)
        panels[column].set_xticks([])
        panels[2 + column].set_xlabel(
            f"first {images[0].shape[1]} of {pair.before.hidden_states.shape[-1]} coordinates"
        )
    return made


@picture
def draw_layers(view: "View") -> Figure:
    """Left: how far the hidden states of every layer moved. Right: how far from where the rotation brings them."""
    made, (moved, astray) = figure(2, title=_said_of_layers(view), width=4.6, height=3.2)
    for pair, colour in ((view.stock, STOCK), (view.rigpt, INVARIANT)):
        style = {"color": colour, "label": pair.name, "marker": "o", "markersize": 4}
        moved.plot(pair.changes, **style)
        astray.plot([max(value, ROUNDING) for value in pair.departures], **style)
    moved.set(title="How far hidden states moved", ylabel="|now − before| / |before|", ylim=(0, 2.05))
    astray.set(title="How far from simply turned along", ylabel="|now − R·before| / |before|")
    astray.set(yscale="log", ylim=(ROUNDING / 2, 10))
    for panel in (moved, astray):
        panel.set_xlabel("layer (0: embeddings)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(loc="best")
    return made


@picture
def draw_demo(findings: "Findings") -> Figure:
    """Left: inside, everything turned. Middle: what comes out. Right: all the way from no rotation to the full one."""
    title = "Turning the hidden space changes all coordinates inside; RiGPT answers as before, stock GPT-2 does not"
    made, (before, rigpt, losses, after, stock, errors) = figure(3, 2, title=title, width=4.5, height=3.6)
    images = [image[:SHOWN_POSITIONS, :48] for image in findings.effect.pictures]
    for panel, image, when in zip((before, after), images, ("before", "after the rotation"), strict=True):
        labels = {"xlabel": f"first {image.shape[1]} dimensions", "ylabel": "token"}
        draw_image(panel, image.numpy(), max(map(most, images)), title=f"RiGPT inside, {when}", **labels)
    for panel, name, colour in ((rigpt, "RiGPT", INVARIANT), (stock, "stock GPT-2", STOCK)):
        share, now = findings.probabilities[name]
        draw_bars(panel, findings.tokens, share, now, colour, "after the rotation")
        panel.set_xlim(0, 1.4 * max(map(float, [*share, *now])))
        panel.set_title(f"{name}: after “{findings.prompt}”")
    _draw_sweep(losses, errors, findings.sweep)
    return made


def _draw_sweep(losses: Any, errors: Any, sweep: "Sweep") -> None:
    """Losses and changes of the logits of both models on the way from the identity to the rotation."""
    for name, colour, loss, error in (
        ("stock GPT-2", STOCK, sweep.stock_loss, sweep.stock_error),
        ("RiGPT", INVARIANT, sweep.rigpt_loss, sweep.rigpt_error),
    ):
        losses.plot(sweep.t, loss, "o-", color=colour, label=name)
        # The start, where the change is 0, has no place on a logarithmic axis.
        errors.semilogy(sweep.t[1:], error[1:], "o-", color=colour, label=name)
    errors.axhline(ROUNDING, color="0.6", linestyle=":", label="rounding of float32")
    losses.set(title="Loss while the hidden space turns", xlabel=SHARE, ylabel="nats per token")
    errors.set(title="Change of the logits", xlabel=SHARE, ylabel="largest change / largest logit")
    errors.set_xlim(-0.05, 1.05)
    losses.legend()
    errors.legend(loc="center right")


def draw_bars(
    panel: Any, tokens: Sequence[str], before: Sequence[float], now: Sequence[float], colour: str, words: str
) -> None:
    """Probabilities of tokens, before in grey and `words` in colour, in a panel from the top down."""
    rows = range(len(tokens))
    panel.barh([row - 0.2 for row in rows], before, height=0.38, color="0.75", label="before")
    panel.barh([row + 0.2 for row in rows], now, height=0.38, color=colour, label=words)
    panel.set_yticks(rows, tokens)
    panel.invert_yaxis()
    panel.set_xlabel("probability of the next token")
    panel.legend(loc="lower right")


def layer_pictures(pair: "Pair", layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The shown part `[tokens, coordinates]` of a layer's hidden states, before and now."""
    before, now = (
        state.hidden_states[layer, :SHOWN_POSITIONS, :SHOWN_DIMENSIONS].float() for state in (pair.before, pair.now)
    )
    return before, now


def most(image: torch.Tensor) -> float:
    """The 97 % quantile of the sizes of the entries; a few large ones would leave the rest of a picture white."""
    return image.abs().flatten().quantile(0.97).item() or 1.0


def likeliest(probabilities: torch.Tensor) -> torch.Tensor:
    """Ids of the ten likeliest tokens, or of all where there are fewer; `probabilities` `[V]`."""
    return probabilities.topk(min(SHOWN_TOKENS, len(probabilities))).indices


def plain(token: str) -> str:
    """A token as a label: with its spaces to be seen, and nothing in it taken for a formula."""
    return repr(token)[1:-1].replace(" ", "·").replace("$", r"\$")
