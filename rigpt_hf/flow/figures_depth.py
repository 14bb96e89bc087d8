"""The figure of depth as time."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .depth import Refinement, flow_end, refinement, trajectory


# Told apart by people who see few colours: Okabe and Ito, "Color Universal Design" (2008).
TOKENS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
SOLVERS = {
    "euler": ("#0072B2", "o", 1, (2, 4, 8, 16, 32, 64)),
    "midpoint": ("#D55E00", "s", 2, (2, 4, 8, 16, 32, 64)),
    "rk4": ("#009E73", "^", 4, (2, 4, 8, 16, 32)),
}


def plot_depth(seed: int = 0) -> Figure:
    """
    Left, the streams of four tokens in the plane of their two leading directions: the layers of an ordinary network
    are the corners of Euler's polygon, and between them lies the flow that finer steps converge to. Right, how fast:
    the error over the step, and what a step across layers costs.

    Args:
        seed: Of weights and tokens.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = _model(generator)
    input_ids = torch.randperm(model.config.vocab_size, generator=generator)[None, : len(TOKENS)]
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_paths(left, model, input_ids)
    _draw_errors(right, model, input_ids)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Depth as time: the layers of a RiGPT are Euler steps of a flow")
    return figure


@torch.no_grad()
def _model(generator: torch.Generator) -> RiGPTForCausalLM:
    """Smooth, and turned enough by its four layers that one step for each is too coarse."""
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
    config = RiGPTConfig(vocab_size=64, hidden_act="gelu", embedding_norm=True, **sizes)
    model = RiGPTForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@torch.no_grad()
def _draw_paths(panel: Any, model: RiGPTForCausalLM, input_ids: Tensor) -> None:
    depth, parts = model.config.num_hidden_layers, 24
    times = [index / parts for index in range(depth * parts + 1)]
    between: dict[str, Any] = {"interpolation": "linear"}
    flow = trajectory(model, input_ids, times, solver="rk4", steps=parts, **between)[:, 0]  # [times, S, d]
    layers = trajectory(model, input_ids, solver="euler", **between)[:, 0]
    quarters = [index / 4 for index in range(4 * depth + 1)]
    finer = trajectory(model, input_ids, quarters, solver="euler", steps=4, **between)[:, 0]
    centre = flow.flatten(0, 1).mean(dim=0)
    _, strengths, directions = torch.linalg.svd(flow.flatten(0, 1) - centre, full_matrices=False)
    share = float(strengths[:2].square().sum() / strengths.square().sum())
    flow, layers, finer = ((states - centre) @ directions[:2].T for states in (flow, layers, finer))
    for token, colour in enumerate(TOKENS):
        first = token == 0
        style = {"color": colour, "solid_capstyle": "round"}
        panel.plot(*flow[:, token].T, linewidth=2.6, label="the flow" if first else None, **style)
        panel.plot(*flow[::parts, token].T, "o", markersize=6, color=colour)
        panel.plot(*flow[0, token], "o", markersize=12, color=colour)
        panel.plot(
            *finer[:, token].T,
            linestyle=":",
            linewidth=1.2,
            label="four steps per layer" if first else None,
            **style,
        )
        panel.plot(
            *layers[:, token].T,
            linestyle="--",
            linewidth=1,
            marker="o",
            markersize=5,
            markerfacecolor="white",
            label="the layers: one Euler step each" if first else None,
            **style,
        )
        panel.annotate(
            f"token {token + 1}", flow[0, token].tolist(), textcoords="offset points", xytext=(9, 9), color=colour
        )
    panel.set_xlabel("first leading direction of the stream (its own units)")
    panel.set_ylabel("second leading direction (same units)")
    panel.set_title(f"Streams from t = 0 (large) to {depth}, weights interpolated; {100 * share:.0f} % of the spread")
    panel.set_aspect("equal", adjustable="datalim")
    legend = panel.legend(frameon=False, loc="best")
    for handle in legend.legend_handles:
        handle.set_color("black")


def _draw_errors(panel: Any, model: RiGPTForCausalLM, input_ids: Tensor) -> None:
    end = flow_end(model, input_ids)
    for solver, (colour, marker, order, steps) in SOLVERS.items():
        records = refinement(model, input_ids, solver, steps, reference=end)
        panel.loglog(*zip(*records, strict=True), marker=marker, color=colour, label=f"{solver}, layer by layer")
        _draw_slope(panel, records[-1], records[0].step, order, colour)
    across = refinement(model, input_ids, "rk4", SOLVERS["rk4"][-1], reference=end, across_layers=True)
    panel.loglog(
        *zip(*across, strict=True), marker="^", markerfacecolor="white", color="#000000", label="rk4, across layers"
    )
    ticks = [1 / count for count in SOLVERS["euler"][-1]]
    panel.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("step (layers)")
    panel.set_ylabel("max |x(L) - flow| / max |flow|")
    panel.set_title("Error over the step; grey: slopes 1, 2 and 4")
    panel.legend(frameon=False, loc="lower right")


def _draw_slope(panel: Any, last: Refinement, largest: float, order: int, colour: str) -> None:
    ends = (last.step, largest)
    panel.loglog(ends, [last.error * (step / last.step) ** order for step in ends], color="0.7", zorder=0)
