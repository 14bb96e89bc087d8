"""A gauge transformation of layers as a path of diffeomorphisms, and where there is none."""

from typing import Any

import torch
from torch import Tensor

from ..flow.diffeomorphism import trajectory, transform_field
from ..flow.lifting import Layer, LiftPath, commutation_errors, lift, network_field
from ..symmetry import haar
from .style import BLUE, GREEN, ORANGE, PURPLE, Figure, figure, picture


SOLVER: dict[str, Any] = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12}
ROUNDING = 1e-16
ONE = torch.eye(3, dtype=torch.float64)
CYCLE, SWAP = ONE[[1, 2, 0]], ONE[[1, 0, 2]]
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


@picture
def plot_lifting(seed: int = 0) -> Figure:
    """
    The path of a cyclic permutation; errors of the diagram at every layer; determinants along paths; a swap in the
    double space.

    Args:
        seed: Of the networks and elements.
    """
    title = "A symmetry of the neurons of a feedforward network is a diffeomorphism of its flow"
    made, (cycle, errors, determinants, letter) = figure(2, 2, title=title, width=4.6, height=4.2, solid=(0, 3))
    _draw_cycle(cycle)
    _draw_errors(errors, seed)
    _draw_determinants(determinants)
    _draw_letter(letter)
    return made


def _draw_cycle(panel: Any) -> None:
    path = LiftPath([ONE, ONE[[2, 0, 1]]])
    ways = torch.stack([path(t) for t in torch.linspace(0, 1, 61, dtype=torch.float64)])
    for column, colour in enumerate((BLUE, ORANGE, GREEN)):
        way = ways[:, :, column]
        panel.plot(*way.T, color=colour, linewidth=3)
        panel.plot(*torch.stack([0 * way[0], way[0]]).T, color=colour, linewidth=1.2)
        panel.quiver(*way[-6], *(way[-1] - way[-6]), color=colour, linewidth=2, arrow_length_ratio=0.6)
        # Beside the first axis, at the ends of the others: off the circle and the ticks.
        place, side = ((0.6, "right"), (1.12, "left"), (1.12, "left"))[column]
        panel.text(*(place * way[0]), f"neuron {column + 1}", color=colour, ha=side, va="bottom")
        half = way[30]
        panel.plot(*torch.stack([0 * half, half]).T, color=colour, linewidth=1, linestyle=":")
    panel.plot(*torch.tensor([[-0.1] * 3, [0.9] * 3]).T, color="0.5", linestyle="--", linewidth=1)
    panel.set(xlabel="$x_1$", ylabel="$x_2$", zlabel="$x_3$", xlim=(-0.2, 1), ylim=(-0.2, 1), zlim=(-0.2, 1))
    panel.set_title(
        "A permutation of three neurons is a rotation by 120°\n(dotted: half-way, where it is no permutation)"
    )
    panel.view_init(elev=24, azim=28)


def _draw_errors(panel: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    scale = torch.diag(torch.tensor([0.4, 2.5, 1.5], dtype=torch.float64))
    turns = [haar(3, generator, special=True) for _ in range(3)]
    rows: tuple[tuple[str, float, list[Tensor], bool, str, str], ...] = (
        ("permutations", 0.2, [CYCLE, CYCLE.T, CYCLE], False, BLUE, "o-"),
        ("positive scalings", 0.2, [scale, scale.inverse(), scale @ scale], False, GREEN, "s-"),
        ("rotations (linear layers)", 1.0, turns, False, PURPLE, "^-"),
        ("odd permutations, doubled", 0.2, [SWAP, CYCLE, SWAP @ CYCLE], True, "0.25", "D-"),
    )

    def draw(errors: list[float], style: str, colour: str, label: str) -> None:
        panel.semilogy(range(5), [max(error, ROUNDING) for error in errors], style, color=colour, label=label)

    for label, slope, inner, double, colour, style in rows:
        layers, elements = example_network(seed, slope), [ONE, *inner, ONE]
        draw(commutation_errors(layers, elements, x, double=double, **SOLVER), style, colour, label)
    draw(_errors_unlifted(seed, x), "x:", ORANGE, "permutations, not lifted")
    panel.axhline(1e-8, color="0.7", linewidth=1)
    panel.text(2, 1.5e-8, "$10^{-8}$: what is asked for", color="0.45", ha="center", va="bottom")
    panel.set(
        title="The lifted flow gives the transformed layers;\nwithout the lift, the end alone agrees",
        xlabel="layer l (time t = l)",
        ylabel="largest difference / largest value",
        xticks=range(5),
        ylim=(ROUNDING / 3, 30),
    )
    # Between the line of the control and that of the limit.
    panel.legend(loc="center", bbox_to_anchor=(0.5, 0.72), frameon=False)


def _errors_unlifted(seed: int, x: Tensor) -> list[float]:
    """Errors at every layer of a control: the transformed layers, beside the ODE that was not lifted; `x` `[B, 3]`."""
    layers, elements, wanted = example_network(seed, 0.2), [ONE, CYCLE, CYCLE.T, CYCLE, ONE], [x]
    for layer, before, after in zip(layers, elements[:-1], elements[1:], strict=True):
        wanted.append(layer.transformed(before, after)(wanted[-1]))
    plain = trajectory(transform_field(network_field(layers), lift([ONE, ONE])), x, range(5), **SOLVER)
    return [((state - want).abs().max() / want.abs().max()).item() for state, want in zip(plain, wanted, strict=True)]


def _draw_determinants(panel: Any) -> None:
    scale = torch.diag(torch.tensor([0.4, 2.5, 2.0], dtype=torch.float64))
    times = torch.linspace(0, 2, 121, dtype=torch.float64)

    def draw(path: Any, colour: str, label: str, **style: Any) -> None:
        panel.plot(times, [torch.linalg.det(path(t)).item() for t in times], color=colour, label=label, **style)

    draw(LiftPath([ONE, scale, ONE]), GREEN, "lift of a scaling")
    draw(LiftPath([ONE, CYCLE, ONE]), BLUE, "of a permutation", linewidth=5, alpha=0.4)
    draw(LiftPath([ONE, SWAP, ONE], double=True), "0.1", "of a swap, in the double space", linestyle="--")
    draw(lambda t: ONE + (1 - (t - 1).abs()) * (SWAP - ONE), ORANGE, "straight line to a swap: no lift")
    panel.fill_between([0, 2], -1.2, 0, color="0.92", zorder=0)
    panel.axhline(0, color="0.4", linewidth=1)
    panel.text(0.04, -1.15, "determinants below 0:\nwhere mirrors are", va="bottom", color="0.35")
    panel.set(
        title="Paths of invertible matrices\nkeep the sign of the determinant",
        xlabel="time t (layers at 0, 1, 2)",
        ylabel="determinant of the matrix at time t",
        xlim=(0, 2),
        ylim=(-1.2, 3.1),
        xticks=[0, 0.5, 1, 1.5, 2],
    )
    panel.legend(loc="upper right")


def _draw_letter(panel: Any) -> None:
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    path = LiftPath([torch.eye(2), swap], double=True)
    # Away from the mirror line, so that the letter and its image stand apart.
    outline = torch.tensor(LETTER, dtype=torch.float64) / 4 + torch.tensor([0.4, -1.3])
    points = torch.cat([outline, torch.zeros_like(outline)], -1)
    for t, alpha in ((0.0, 0.95), (0.36, 0.35), (0.5, 0.35), (0.64, 0.35), (1.0, 0.95)):
        corners = (points @ path(torch.tensor(t, dtype=torch.float64)).T)[:, :3]
        colour = BLUE if t == 0 else ORANGE if t == 1 else "0.55"
        panel.add_collection3d(Poly3DCollection([corners.tolist()], facecolor=colour, edgecolor="0.2", alpha=alpha))
    way = torch.stack([path(t) @ points[1] for t in torch.linspace(0, 1, 41, dtype=torch.float64)])
    panel.plot(*way[:, :3].T, color="0.3", linestyle=":")
    line = torch.tensor([-1.5, 1.5])
    panel.plot(line, line, 0 * line, color="0.4", linestyle="--", linewidth=1)
    panel.set(xlabel="$x_1$", ylabel="$x_2$", zlabel="$y_1$ (the double)", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    panel.set_title("Swapping two neurons is a reflection,\nand takes another dimension (blue to orange)")
    # The half turn may go either way; upwards is easier to read.
    if way[20, 2] < 0:
        panel.invert_zaxis()
    panel.view_init(elev=25, azim=-115)
    panel.set_box_aspect((1, 1, 0.6))
