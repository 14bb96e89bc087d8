"""How a gauge transformation of layers becomes a path of diffeomorphisms, and where there is none."""

from typing import Any

import torch
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from torch import Tensor

from ..symmetry import haar
from .diffeomorphism import trajectory, transform_field
from .lifting import Layer, LiftPath, commutation_errors, lift, network_field


# Distinct to the colour-blind (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SOLVER: dict[str, Any] = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12}
ROUNDING = 1e-16
# The letter F, centred: no rotation of the plane makes its mirror image.
LETTER = [(0, 0), (0, 5), (3, 5), (3, 4), (1, 4), (1, 3), (2.4, 3), (2.4, 2), (1, 2), (1, 0)]


def example_network(seed: int, slope: float, depth: int = 4, size: int = 3) -> list[Layer]:
    """Layers of determinants above 0, the last one linear."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(depth):
        weight = torch.eye(size) + torch.randn(size, size, generator=generator, dtype=torch.float64) / 2
        weight[0] *= torch.linalg.det(weight).sign()
        bias = torch.randn(size, generator=generator, dtype=torch.float64) / 2
        layers.append(Layer(weight, bias, slope if index < depth - 1 else 1.0))
    return layers


def plot_lifting(seed: int = 0) -> Figure:
    """
    The path of a cyclic permutation; errors of the diagram at every layer; determinants along paths; a swap in the
    double space.

    Args:
        seed: Of the networks and elements.
    """
    figure = Figure(figsize=(14, 8.6), dpi=110, layout="constrained")
    _draw_cycle(figure.add_subplot(2, 2, 1, projection="3d"))
    _draw_errors(figure.add_subplot(2, 2, 2), seed)
    _draw_determinants(figure.add_subplot(2, 2, 3))
    _draw_letter(figure.add_subplot(2, 2, 4, projection="3d"))
    return figure


def _draw_cycle(panel: Any) -> None:
    one = torch.eye(3, dtype=torch.float64)
    path = LiftPath([one, one[[2, 0, 1]]])
    ways = torch.stack([path(t) for t in torch.linspace(0, 1, 61, dtype=torch.float64)])
    for column, color in enumerate((BLUE, ORANGE, GREEN)):
        way = ways[:, :, column]
        panel.plot(*way.T, color=color, linewidth=3)
        panel.plot(*torch.stack([0 * way[0], way[0]]).T, color=color, linewidth=1.2)
        panel.quiver(*way[-6], *(way[-1] - way[-6]), color=color, linewidth=2, arrow_length_ratio=0.6)
        panel.text(*(1.12 * way[0]), f"neuron {column + 1}", color=color)
        half = way[30]
        panel.plot(*torch.stack([0 * half, half]).T, color=color, linewidth=1, linestyle=":")
    panel.plot(*torch.tensor([[-0.1] * 3, [0.9] * 3]).T, color="0.5", linestyle="--", linewidth=1)
    panel.set(xlabel="$x_1$", ylabel="$x_2$", zlabel="$x_3$", xlim=(-0.2, 1), ylim=(-0.2, 1), zlim=(-0.2, 1))
    panel.set_title(
        "A permutation of three neurons is a rotation by 120°\n(dotted: half-way, where it is no permutation)"
    )
    panel.view_init(elev=24, azim=28)


def _draw_errors(panel: Any, seed: int) -> None:
    one = torch.eye(3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    cycle, swap = one[[1, 2, 0]], one[[1, 0, 2]]
    scale = torch.diag(torch.tensor([0.4, 2.5, 1.5], dtype=torch.float64))
    turns = [haar(3, generator, special=True) for _ in range(3)]
    rows = (
        ("permutations", 0.2, [cycle, cycle.T, cycle], False, BLUE, "o"),
        ("positive scalings", 0.2, [scale, scale.inverse(), scale @ scale], False, GREEN, "s"),
        ("rotations (linear layers)", 1.0, turns, False, PURPLE, "^"),
        ("odd permutations, doubled", 0.2, [swap, cycle, swap @ cycle], True, "0.25", "D"),
    )
    for label, slope, inner, double, color, marker in rows:
        layers, elements = example_network(seed, slope), [one, *inner, one]
        errors = commutation_errors(layers, elements, x, double=double, **SOLVER)
        shown = [max(error, ROUNDING) for error in errors]
        panel.semilogy(range(5), shown, color=color, marker=marker, label=label)
    # Control: the transformed layers, beside the ODE that was not lifted.
    layers, state, wanted = example_network(seed, 0.2), x, [x]
    for layer, before, after in zip(layers, [one, cycle, cycle.T, cycle], [cycle, cycle.T, cycle, one], strict=True):
        state = layer.transformed(before, after)(state)
        wanted.append(state)
    plain = trajectory(transform_field(network_field(layers), lift([one, one])), x, range(5), **SOLVER)
    wrong = [_relative(mine, want) for mine, want in zip(plain, wanted, strict=True)]
    panel.semilogy(
        range(5),
        [max(e, ROUNDING) for e in wrong],
        "x:",
        color=ORANGE,
        label="permutations, not lifted (the same function at the end)",
    )
    panel.axhline(1e-8, color="0.7", linewidth=1)
    panel.text(0, 1.5e-8, "$10^{-8}$: what is asked for", color="0.45", va="bottom")
    panel.set(
        title="Lift, then flow = transform, then multiply",
        xlabel="layer l (time t = l)",
        ylabel="largest difference / largest value",
        xticks=range(5),
        ylim=(ROUNDING / 3, 30),
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="center", bbox_to_anchor=(0.56, 0.73), fontsize=8)


def _draw_determinants(panel: Any) -> None:
    one = torch.eye(3, dtype=torch.float64)
    cycle, swap = one[[1, 2, 0]], one[[1, 0, 2]]
    scale = torch.diag(torch.tensor([0.4, 2.5, 2.0], dtype=torch.float64))
    times = torch.linspace(0, 2, 121, dtype=torch.float64)

    def along(path: Any) -> list[float]:
        return [torch.linalg.det(path(t)).item() for t in times]

    panel.plot(times, along(LiftPath([one, scale, one])), color=GREEN, label="lift of a scaling")
    panel.plot(times, along(LiftPath([one, cycle, one])), color=BLUE, linewidth=5, alpha=0.4, label="of a permutation")
    doubled = LiftPath([one, swap, one], double=True)
    panel.plot(times, along(doubled), color="0.1", linestyle="--", label="of a swap, in the double space")
    straight = [torch.linalg.det(one + (1 - (t - 1).abs()) * (swap - one)).item() for t in times]
    panel.plot(times, straight, color=ORANGE, label="straight line to a swap: no lift")
    panel.fill_between([0, 2], -1.2, 0, color="0.92", zorder=0)
    panel.axhline(0, color="0.4", linewidth=1)
    panel.text(1, -0.35, "the other component of GL", ha="center", color="0.35")
    panel.set(
        title="Paths of invertible matrices keep the sign of the determinant",
        xlabel="time t (layers at 0, 1, 2)",
        ylabel="det Q(t)",
        xlim=(0, 2),
        ylim=(-1.2, 3.1),
        xticks=[0, 0.5, 1, 1.5, 2],
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper right", fontsize=8)


def _draw_letter(panel: Any) -> None:
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    path = LiftPath([torch.eye(2), swap], double=True)
    # Away from the mirror line, so that the letter and its image stand apart.
    outline = torch.tensor(LETTER, dtype=torch.float64) / 4 + torch.tensor([0.4, -1.3])
    points = torch.cat([outline, torch.zeros_like(outline)], -1)
    for t, alpha in ((0.0, 0.95), (0.36, 0.35), (0.5, 0.35), (0.64, 0.35), (1.0, 0.95)):
        corners = (points @ path(torch.tensor(t, dtype=torch.float64)).T)[:, :3]
        color = BLUE if t == 0 else ORANGE if t == 1 else "0.55"
        panel.add_collection3d(Poly3DCollection([corners.tolist()], facecolor=color, edgecolor="0.2", alpha=alpha))
    way = torch.stack([path(t) @ points[1] for t in torch.linspace(0, 1, 41, dtype=torch.float64)])
    panel.plot(*way[:, :3].T, color="0.3", linestyle=":")
    line = torch.tensor([-1.5, 1.5])
    panel.plot(line, line, 0 * line, color="0.4", linestyle="--", linewidth=1)
    panel.set(xlabel="$x_1$", ylabel="$x_2$", zlabel="$y_1$ (the double)", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    panel.set_title("Swapping two neurons is a reflection: it takes another dimension\n(blue: t = 0, orange: t = 1)")
    # The half turn may go either way; upwards is easier to read.
    if way[20, 2] < 0:
        panel.invert_zaxis()
    panel.view_init(elev=25, azim=-115)
    panel.set_box_aspect((1, 1, 0.6))


def _relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()
