"""
The balanced representative: translations removed, stretches chosen so that every conserved charge is zero.

On the orbit of a group of matrices the points of least norm are those where the charges vanish, and any two of them
differ by an element of the compact part only (Kempf and Ness 1979). So balancing reduces the whole gauge group to
rotations, reflections and permutations, with which lengths and angles between weights mean something.
"""

import torch

from ..configuration_rigpt import RiGPTConfig
from .action import GaugeTransformation
from .contraction import Weights, contract
from .frames import frame_keys, in_layer, kind_of, prefix_of, shifts
from .groups import MatrixGroup, Role
from .permutations import NeuronGroup, Translations


# Singular values below this part of the largest are taken for zero.
RANK_TOLERANCE = 1e-12
# Gram matrices square condition numbers; a second pass from the nearly balanced point makes up for it.
PASSES = 2


def balance(
    config: RiGPTConfig, weights: Weights, passes: int = PASSES
) -> tuple[GaugeTransformation, dict[str, torch.Tensor]]:
    """
    The transformation that balances a model's weights, and the balanced weights in float64.

    Args:
        config: Of the model.
        weights: Parameters by name, as [`weights_of`] gives them.
        passes: How often the balancing is refined.
    """
    total = _without_translations(config, weights)
    balanced = total.state_dict({name: tensor.to(torch.float64) for name, tensor in weights.items()})
    keys = {key: frame.group for key, frame in frame_keys(config).items()}
    for _ in range(passes):
        elements = {}
        for key, roles in contract(config, balanced, balanced, lambda key: can_stretch(keys[key])).items():
            group = keys[key]
            if isinstance(group, MatrixGroup):
                elements[key] = balancing_matrices(group, roles)
            elif isinstance(group, NeuronGroup):
                elements[key] = balancing_scales(group, roles)
        step = GaugeTransformation(config, elements)
        total, balanced = step @ total, step.state_dict(balanced)
    return total, balanced


def can_stretch(group: object) -> bool:
    """Whether a group has elements that change lengths."""
    if isinstance(group, MatrixGroup):
        return group.stretch != "none"
    return isinstance(group, NeuronGroup) and group.dimension > 0


def _without_translations(config: RiGPTConfig, weights: Weights) -> GaugeTransformation:
    """Biases of keys and values that nothing sees go to zero, and so does the mean of free token vectors."""
    elements = {}
    for key, frame in frame_keys(config).items():
        if isinstance(frame.group, Translations):
            vectors = weights[in_layer(shifts(config)[kind_of(key)].like, prefix_of(key))].to(torch.float64)
            mean = vectors if vectors.dim() == 1 else vectors.mean(dim=0)
            elements[key] = -frame.group.project(mean.reshape(frame.copies, -1))
    return GaugeTransformation(config, elements)


def balancing_matrices(group: MatrixGroup, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
    """Elements `[copies, n, n]` after which the charge is zero, from the Gram matrices `[copies, n, n]` by role."""
    vectors, covectors = grams["vector"], grams["covector"]
    if group.stretch == "none":
        return group.identity(len(vectors))
    if group.stretch == "common":
        metric = grams["metric"].diagonal(dim1=-2, dim2=-1).sum(-1)
        traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (vectors, covectors)]
        squares = torch.stack([_common_stretch(*values) for values in zip(*traces, metric, strict=True)])
        return group.identity(len(vectors)) * squares.sqrt()[:, None, None]
    return torch.stack([_balancing(group, *pair) for pair in zip(vectors, covectors, strict=True)])


def _balancing(group: MatrixGroup, vectors: torch.Tensor, covectors: torch.Tensor) -> torch.Tensor:
    first, second = group.pairs
    strengths = [gram[first, first] + gram[second, second] for gram in (vectors, covectors)]
    seen = (strengths[0] > 0) & (strengths[1] > 0)
    scales = torch.where(seen, strengths[1] / strengths[0], 1.0) ** 0.25
    element = group.from_planes(torch.zeros_like(scales), scales)
    if group.rest:
        index = torch.tensor(group.rest)
        block = index[:, None], index
        # Of all that balance the symmetric positive one: it turns nothing, and is near 1 where little is to do.
        _, stretches, axes = torch.linalg.svd(contragredient(vectors[block], covectors[block]))
        element[block] = (axes.T * stretches) @ axes
    return element


def contragredient(vectors: torch.Tensor, covectors: torch.Tensor) -> torch.Tensor:
    """
    `M` `[n, n]` with `M A Mᵀ = M⁻ᵀ B M⁻¹` diagonal and descending, for Gram matrices `A` of vectors, `B` of covectors.

    The diagonal holds the singular values of the product of the two factors. Known from control theory as balancing
    (Moore 1981). Directions that only one of the two fills are whitened in that one; the other has nothing there.
    """
    if torch.linalg.matrix_rank(vectors, hermitian=True) < torch.linalg.matrix_rank(covectors, hermitian=True):
        return torch.linalg.inv(contragredient(covectors, vectors)).T
    strengths, basis = torch.linalg.eigh(vectors)
    floor = RANK_TOLERANCE * strengths[-1]
    # In directions that no vector fills any length will do.
    root = basis * torch.where(strengths > floor, strengths, torch.ones_like(strengths)).sqrt()
    squared, turn = torch.linalg.eigh(root.T @ covectors @ root)
    squared, turn = squared.flip(0), turn.flip(1)
    balanced = torch.where(squared > RANK_TOLERANCE * squared[0], squared, torch.ones_like(squared))
    return balanced[:, None] ** 0.25 * (turn.T @ torch.linalg.inv(root))


def _common_stretch(vectors: torch.Tensor, covectors: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """
    The square s of the stretch at which `s A - B/s + 2 s² C` vanishes, for `A = Σ|q|²`, `B = Σ|k|²`, `C = Σ λ²`.

    Newton's method on `log s`, in which the sum `s A + B/s + s² C` that it makes least is convex.
    """
    if vectors + metric == 0 or covectors == 0:
        return torch.ones_like(vectors)
    position = torch.zeros_like(vectors)
    for _ in range(100):
        up, down, weight = position.exp() * vectors, covectors / position.exp(), 2 * (2 * position).exp() * metric
        step = ((up - down + weight) / (up + down + 2 * weight)).clamp(-2, 2)
        position = position - step
        if step.abs() < 1e-15:
            break
    return position.exp()


def balancing_scales(group: NeuronGroup, norms: dict[Role, torch.Tensor]) -> torch.Tensor:
    """The element of least norm among a layer's scalings of neurons, from `|.|²` `[1, F]` by role."""
    down = norms["down"][0]
    active, linear = (norms.get(role, norms["down"])[0] for role in ("active", "linear"))
    alive = (down > 0) & (active > 0) & (linear > 0)
    ones = torch.ones_like(down)
    scaled_active, scaled_linear = group.allowed.tolist()
    degree = group.degree or 0
    # Least `a² A + b² B + D / (a^2p b²)` where `a² A = p D'` and `b² B = D'`, D' being the last term.
    if scaled_active and scaled_linear:
        last = (down * linear * (active / degree) ** degree) ** (1 / (2 + degree))
    elif scaled_active:
        last = (down * (active / degree) ** degree) ** (1 / (1 + degree))
    else:
        last = (down * linear).sqrt()
    squares = [degree * last / active if scaled_active else ones, last / linear if scaled_linear else ones]
    scales = [torch.where(alive, square, ones).sqrt() for square in squares]
    return group.element(torch.arange(group.n), *scales)
