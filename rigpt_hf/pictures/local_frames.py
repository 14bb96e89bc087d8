"""A frame per layer, seen: coordinates that jump, logits that do not, and a connection without curvature."""

import math
from typing import Any

import torch

from ..symmetry import connection, curvature, haar, holonomy, so_exp, so_log, to_local_frames
from .models import gaussian_model
from .style import BLUE, GREEN, ORANGE, Figure, draw_image, figure, picture


LAYERS, SIZE, SHOWN = 8, 48, 24
# Drawn so that layers write as much as they find.
MODEL = {"vocab_size": 61, "hidden_size": SIZE, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
FLOOR = 1e-17


def curve(times: torch.Tensor, generators: torch.Tensor) -> torch.Tensor:
    """`Q(t) = exp(sin(t) A) exp(t² B / 4)`, `[T, d, d]`, for two skew matrices `[2, d, d]`."""
    first, second = generators
    return so_exp(times.sin()[:, None, None] * first) @ so_exp(times.square()[:, None, None] / 4 * second)


def velocity(time: torch.Tensor, generators: torch.Tensor) -> torch.Tensor:
    """`∂_t Q Qᵀ` of [`curve`] at one time, `[d, d]`."""
    first, second = generators
    turn = so_exp(time.sin() * first)
    return time.cos() * first + time / 2 * turn @ second @ turn.mT


def connection_errors(steps: list[float], seed: int = 0, size: int = 6) -> list[float]:
    """How far `log(Q(t + h) Q(t)ᵀ) / h` is from `∂_t Q Qᵀ` halfway, relative, for each step `h`."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    generators = (skew - skew.mT) / size
    time = torch.tensor(0.7, dtype=torch.float64)
    exact = velocity(time, generators)
    errors = []
    for step in steps:
        before, after = curve(torch.stack([time - step / 2, time + step / 2]), generators)
        errors.append(float((so_log(after @ before.mT) / step - exact).norm() / exact.norm()))
    return errors


@picture
@torch.no_grad()
def plot_local_frames(seed: int = 0) -> Figure:
    """Coordinates of one token's stream in both kinds of frames, and what the connection between them is."""
    sizes = {"max_position_embeddings": 32, "tie_word_embeddings": False}
    model = gaussian_model(torch.Generator().manual_seed(seed), 0.15, **MODEL, **sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    turns = torch.stack([haar(SIZE, generator, special=True) for _ in range(LAYERS)])
    local, broken = (to_local_frames(model, turns) for _ in range(2))
    broken.model.layers[LAYERS // 2].transport.weight.copy_(torch.eye(SIZE))
    ids = torch.randint(3, 61, (1, 12), generator=generator)
    plain, moved = (each(ids, output_hidden_states=True, use_cache=False) for each in (model, local))
    scale = plain.logits.abs().max()
    everywhere = connection(local)[:, None].expand(-1, 12, -1, -1)
    skew = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    bent = everywhere.clone()
    bent[LAYERS // 2, 6] = so_exp(0.02 * (skew - skew.T)) @ bent[LAYERS // 2, 6]
    differences = {
        "axes per layer": (moved.logits - plain.logits).abs().max() / scale,
        "one change of\naxes left out": (broken(ids, use_cache=False).logits - plain.logits).abs().max() / scale,
        "curvature": curvature(everywhere),
        "holonomy": holonomy(local),
        "curvature, if one\ndepends on the\nposition": curvature(bent),
    }
    title = "Every layer may have axes of its own: other coordinates, and the same function"
    made, (left, middle, bars, slope) = figure(4, title=title, width=4.2, height=3.8)
    for panel, words, output in (
        (left, "Hidden state of one token,\nthe same axes in all layers", plain),
        (middle, "The same hidden state,\nother axes in every layer", moved),
    ):
        stream = torch.stack([state[0, -1, :SHOWN] for state in output.hidden_states[:-1]])
        labels = {"title": words, "xlabel": "after layer", "ylabel": f"coordinate (first {SHOWN} of {SIZE})"}
        image = draw_image(panel, stream.T, float(stream.abs().max()), **labels)
    made.colorbar(image, ax=[left, middle], label="value of the coordinate", shrink=0.8)
    _draw_differences(bars, {name: max(float(value), FLOOR) for name, value in differences.items()})
    _draw_order(slope, seed)
    return made


def _draw_differences(panel: Any, differences: dict[str, float]) -> None:
    """Bars; those of controls, whose names have more than one line, in another colour."""
    names, values = list(differences), list(differences.values())
    panel.barh(names, values, color=[ORANGE if "\n" in name else BLUE for name in names], left=FLOOR)
    panel.set(
        title="All is exact up to rounding,\nunlike two controls (orange)",
        xscale="log",
        xlim=(FLOOR, 1e3),
        xlabel="largest difference (of logits: relative)",
    )
    panel.invert_yaxis()
    offset: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
    for row, value in enumerate(values):
        panel.annotate(f"{value:.0e}", (value, row), fontsize=8, **offset)


def _draw_order(panel: Any, seed: int) -> None:
    """The transport between frames near each other, against the exponential of the connection."""
    steps = [2.0**-k for k in range(1, 8)]
    errors = connection_errors(steps, seed)
    panel.loglog(steps, errors, "o-", color=GREEN, label="measured")
    panel.loglog(
        steps, [errors[0] * (h / steps[0]) ** 2 for h in steps], "--", color="0.5", label="square of the step"
    )
    order = math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])
    panel.set(
        title=f"Between near layers the axes turn at a rate:\nits error falls as the step to the power {order:.2f}",
        xlabel="step of depth",
        ylabel="relative error of the rate",
    )
    panel.legend()
