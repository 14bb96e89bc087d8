"""A flow under a spacetime diffeomorphism: other paths, the same ends."""

import math
from typing import Any

import torch
from torch import Tensor

from ..flow.diffeomorphism import SpacetimeMap, flow, flow_difference, trajectory, transform_field
from .style import BLUE, ORANGE, Figure, figure, picture


TOLERANCES = [1e-3, 1e-4, 1e-6, 1e-8, 1e-10]
FRAMES = 61
STRENGTH = 2.6
SOLVER: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}


def swirl(strength: float, fixed: bool = True) -> SpacetimeMap:
    """
    Turns every circle round the origin by an angle of its own, and comes back at t = 1 if `fixed`.

    The inverse turns back, as radii stay.
    """

    def space(t: Tensor, x: Tensor, sign: float = 1.0) -> Tensor:
        strong = torch.sin(math.pi * t) ** 2 if fixed else torch.sin(math.pi * t / 2) ** 2
        angle = sign * strength * strong * torch.exp(-x.square().sum(-1) / 2)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)

    return SpacetimeMap(
        time=lambda t: t + 0.3 * t * (1 - t),
        space=space,
        time_inverse=lambda t: (1.3 - torch.sqrt(1.69 - 1.2 * t)) / 0.6,
        space_inverse=lambda t, y: space(t, y, -1.0),
    )


def drift(t: Tensor, x: Tensor) -> Tensor:
    """To the right in waves, on the plane."""
    a, b = x.unbind(-1)
    return torch.stack([2.6 + 0 * a, 0.9 * torch.cos(2.2 * a + 2 * t) - 0.5 * torch.sin(2 * b)], -1)


@picture
def plot_diffeomorphism(seed: int = 0) -> Figure:
    """
    Left: paths in a nonlinear field and of its image under a [`swirl`]. Right: by how much their ends differ, over the
    tolerance of the solver, for a map that is the identity at both ends and for one that is at the first only.

    Args:
        seed: Of the points where the right panel starts.
    """
    made, panels = figure(3, title="One flow in two descriptions: other ways, the same ends", width=4.2, height=4.4)
    _draw_paths(made, panels[:2])
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for fixed, label, style in (
        (True, "identity at both ends", {"color": BLUE, "marker": "o"}),
        (False, "identity at t = 0 only", {"color": ORANGE, "marker": "s"}),
    ):
        map = swirl(STRENGTH, fixed)
        errors = [flow_difference(drift, map, x, 0, 1, rtol=rtol, atol=rtol / 100) for rtol in TOLERANCES]
        panels[2].loglog(TOLERANCES, errors, label=label, **style)
    panels[2].invert_xaxis()
    panels[2].set(
        title="Same ends, up to the solver's error",
        xlabel="relative tolerance of the solver (dopri5)",
        ylabel="max |F′(x) − F(x)| / max |F(x)|",
    )
    panels[2].legend(loc="lower left")
    return made


def _draw_paths(made: Figure, panels: list[Any]) -> None:
    """Paths of [`drift`] and of its image, coloured by time."""
    from matplotlib.collections import LineCollection

    start = torch.stack([torch.full((17,), -1.3), torch.linspace(-1.6, 1.6, 17)], -1).double()
    times = torch.linspace(0, 1, FRAMES)
    ends = flow(drift, start, 0, 1, **SOLVER)
    fields = {
        "Paths of a field": drift,
        "The same field, swirled in between": transform_field(drift, swirl(STRENGTH)),
    }
    for panel, (title, field) in zip(panels, fields.items(), strict=True):
        for points in trajectory(field, start, times, **SOLVER).unbind(1):
            segments = [points[index : index + 2].numpy() for index in range(FRAMES - 1)]
            lines = LineCollection(segments, array=times[:-1].numpy(), cmap="viridis", linewidths=1.8, clim=(0, 1))
            panel.add_collection(lines)
        panel.plot(*start.T, "o", color="0.25", markersize=4, label="start, t = 0")
        panel.plot(*ends.T, "D", color=ORANGE, markersize=5, markerfacecolor="white", label="end of the first, t = 1")
        panel.set(title=title, xlabel="$x_1$", ylabel="$x_2$", xlim=(-2.1, 2.1), ylim=(-2.2, 2.2), aspect="equal")
        panel.legend(loc="lower left", ncols=2)
    made.colorbar(lines, ax=panels[1], label="time", shrink=0.8, pad=0.01)
