"""Depth as time: the layers of a RiGPT as Euler's polygon, and how fast solvers converge to the flow."""

from typing import Any

import torch
from torch import Tensor, nn

from ..flow.depth import Refinement, flow_end, refinement, trajectory
from .models import gaussian_model
from .style import BLACK, BLUE, COLOURS, GREEN, ORANGE, Figure, figure, picture


TOKENS = 4
SOLVERS = {
    "euler": ("Euler", BLUE, "o", 1, (2, 4, 8, 16, 32, 64)),
    "midpoint": ("midpoint", ORANGE, "s", 2, (2, 4, 8, 16, 32, 64)),
    "rk4": ("Runge–Kutta", GREEN, "^", 4, (2, 4, 8, 16, 32)),
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
        2,
        title="The layers of a RiGPT are Euler steps of a flow, which finer steps approach",
        width=4.4,
        height=4.8,
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
    between = [torch.lerp(layers[:-1], layers[1:], part / parts) for part in range(parts + 1)]
    lines = torch.cat([flow, finer, *between]).flatten(0, 1)
    for token, colour in enumerate(COLOURS[:TOKENS]):
        panel.plot(*flow[::parts, token].T, "o", markersize=6, color=colour)
        panel.plot(*flow[0, token], "o", markersize=12, color=colour)
        for path, words, style in styles:
            panel.plot(*path[:, token].T, color=colour, label=None if token else words, **style)
        panel.text(*_free_place(flow[0, token], lines), str(token + 1), color=colour, ha="center", va="center")
    panel.set(
        title=f"The hidden states of tokens 1 to {TOKENS}\nflow on from the large dots",
        xlabel=f"first leading direction (the two: {100 * share:.0f} % of the spread)",
        ylabel="second leading direction",
    )
    panel.set_aspect("equal", adjustable="datalim")
    legend = panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    for handle in legend.legend_handles:
        handle.set_color("black")


def _free_place(start: Tensor, lines: Tensor) -> list[float]:
    """The place beside a point `[2]` that is furthest from all that is drawn, `[points, 2]`."""
    angles = torch.linspace(0, 2 * torch.pi, 25, dtype=lines.dtype)[:-1]
    reach = 0.07 * (lines.amax(0) - lines.amin(0)).amax()
    places = start + reach * torch.stack([angles.cos(), angles.sin()], dim=-1)
    best: list[float] = places[torch.cdist(places, lines).amin(dim=1).argmax()].tolist()
    return best


def _draw_errors(panel: Any, model: nn.Module, input_ids: Tensor) -> None:
    end = flow_end(model, input_ids)
    for solver, (words, colour, marker, order, steps) in SOLVERS.items():
        records = refinement(model, input_ids, solver, steps, reference=end)
        panel.loglog(*zip(*records, strict=True), marker=marker, color=colour, label=f"{words}, layer by layer")
        _draw_slope(panel, records[-1], records[0].step, order)
    across = refinement(model, input_ids, "rk4", SOLVERS["rk4"][-1], reference=end, across_layers=True)
    style = {"marker": "^", "markerfacecolor": "white", "color": BLACK}
    panel.loglog(*zip(*across, strict=True), label="Runge–Kutta, across layers", **style)
    panel.set_xticks([1 / count for count in SOLVERS["euler"][-1]], [f"1/{n}" for n in SOLVERS["euler"][-1]])
    panel.minorticks_off()
    panel.set(
        title="A solver of order 1, 2 or 4 errs by\nthat power of the step (grey lines)",
        xlabel="step of the solver, in layers",
        ylabel="relative error after the last layer",
    )
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_slope(panel: Any, last: Refinement, largest: float, order: int) -> None:
    ends = (last.step, largest)
    panel.loglog(ends, [last.error * (step / last.step) ** order for step in ends], color="0.7", zorder=0)
