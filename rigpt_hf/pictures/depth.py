"""Depth as time: the layers of a RiGPT as Euler's polygon, and how fast solvers converge to the flow."""

from typing import Any

import torch
from torch import Tensor, nn

from ..flow.depth import Refinement, flow_end, refinement, trajectory
from .models import gaussian_model
from .style import BLACK, BLUE, COLOURS, GREEN, ORANGE, Figure, figure, picture


TOKENS = 4
SOLVERS = {
    "euler": (BLUE, "o", 1, (2, 4, 8, 16, 32, 64)),
    "midpoint": (ORANGE, "s", 2, (2, 4, 8, 16, 32, 64)),
    "rk4": (GREEN, "^", 4, (2, 4, 8, 16, 32)),
}
# Smooth, and turned enough by its four layers that one step for each is too coarse.
MODEL = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}


@picture
def plot_depth(seed: int = 0) -> Figure:
    """
    Left, the streams of four tokens in the plane of their two leading directions: the layers of an ordinary network
    are the corners of Euler's polygon, and between them lies the flow that finer steps converge to. Right, how fast:
    the error over the step, and what a step across layers costs.

    Args:
        seed: Of weights and tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    model = gaussian_model(generator, 0.3, hidden_act="gelu", embedding_norm=True, **MODEL)
    input_ids = torch.randperm(model.config.vocab_size, generator=generator)[None, :TOKENS]
    made, (left, right) = figure(
        2, title="Depth as time: the layers of a RiGPT are Euler steps of a flow", width=4.4, height=4.4
    )
    _draw_paths(left, model, input_ids)
    _draw_errors(right, model, input_ids)
    return made


@torch.no_grad()
def _draw_paths(panel: Any, model: nn.Module, input_ids: Tensor) -> None:
    depth, parts = model.config.num_hidden_layers, 24

    def states(steps: int, solver: str) -> Tensor:
        """The streams `[times, S, d]` at all ends of so many steps per layer."""
        times = [index / steps for index in range(depth * steps + 1)]
        return trajectory(model, input_ids, times, solver=solver, steps=steps, interpolation="linear")[:, 0]

    flow, layers, finer = states(parts, "rk4"), states(1, "euler"), states(4, "euler")
    centre = flow.flatten(0, 1).mean(dim=0)
    _, strengths, directions = torch.linalg.svd(flow.flatten(0, 1) - centre, full_matrices=False)
    share = float(strengths[:2].square().sum() / strengths.square().sum())
    flow, layers, finer = ((states - centre) @ directions[:2].T for states in (flow, layers, finer))
    styles: tuple[tuple[Tensor, str, dict[str, Any]], ...] = (
        (flow, "the flow", {"linewidth": 2.6}),
        (finer, "four steps per layer", {"linewidth": 1.2, "linestyle": ":"}),
        (
            layers,
            "the layers: one Euler step each",
            {"linewidth": 1, "linestyle": "--", "marker": "o", "markersize": 5, "markerfacecolor": "white"},
        ),
    )
    for token, colour in enumerate(COLOURS[:TOKENS]):
        panel.plot(*flow[::parts, token].T, "o", markersize=6, color=colour)
        panel.plot(*flow[0, token], "o", markersize=12, color=colour)
        for path, words, style in styles:
            panel.plot(*path[:, token].T, color=colour, label=None if token else words, **style)
        offset: dict[str, Any] = {"textcoords": "offset points", "xytext": (9, 9)}
        panel.annotate(f"token {token + 1}", flow[0, token].tolist(), color=colour, **offset)
    panel.set(
        title=f"Streams from t = 0 (large) to {depth},\n{100 * share:.0f} % of the spread",
        xlabel="first leading direction of the stream (its own units)",
        ylabel="second leading direction (same units)",
    )
    panel.set_aspect("equal", adjustable="datalim")
    for handle in panel.legend(loc="best").legend_handles:
        handle.set_color("black")


def _draw_errors(panel: Any, model: nn.Module, input_ids: Tensor) -> None:
    end = flow_end(model, input_ids)
    for solver, (colour, marker, order, steps) in SOLVERS.items():
        records = refinement(model, input_ids, solver, steps, reference=end)
        panel.loglog(*zip(*records, strict=True), marker=marker, color=colour, label=f"{solver}, layer by layer")
        _draw_slope(panel, records[-1], records[0].step, order)
    across = refinement(model, input_ids, "rk4", SOLVERS["rk4"][-1], reference=end, across_layers=True)
    style = {"marker": "^", "markerfacecolor": "white", "color": BLACK}
    panel.loglog(*zip(*across, strict=True), label="rk4, across layers", **style)
    panel.set_xticks([1 / count for count in SOLVERS["euler"][-1]], [f"1/{n}" for n in SOLVERS["euler"][-1]])
    panel.minorticks_off()
    panel.set(
        title="Error over the step\ngrey: slopes 1, 2 and 4",
        xlabel="step (layers)",
        ylabel="max |x(L) - flow| / max |flow|",
    )
    panel.legend(loc="lower right")


def _draw_slope(panel: Any, last: Refinement, largest: float, order: int) -> None:
    ends = (last.step, largest)
    panel.loglog(ends, [last.error * (step / last.step) ** order for step in ends], color="0.7", zorder=0)
