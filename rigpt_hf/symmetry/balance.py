"""
The balanced representative: translations removed, local frames made one, stretches chosen so that every conserved
charge is zero.

On the orbit of a group of matrices the points of least norm are those where the charges vanish, and any two of them
differ by an element of the compact part only (Kempf and Ness 1979). So balancing reduces the whole gauge group to
rotations, reflections and permutations, with which lengths and angles between weights mean something.
"""

import torch

from ..configuration_rigpt import RiGPTConfig
from .action import GaugeTransformation
from .contraction import Weights, contract
from .frames import frame_keys, in_layer, kind_of, prefix_of, refuse_shared_frames, shifts
from .groups import MatrixGroup, Role
from .local_frames import flattening
from .permutations import NeuronGroup, Translations


# Singular values below this part of the largest are taken for zero.
RANK_TOLERANCE = 1e-12
# Gram matrices square condition numbers; a second pass from the nearly balanced point makes up for it.
PASSES = 2


def balance(
    config: RiGPTConfig, weights: Weights, passes: int = PASSES, lone: float = 1.0
) -> tuple[GaugeTransformation, dict[str, torch.Tensor]]:
    """
    The transformation that balances a model's weights, and the balanced weights in float64.

    Args:
        config: Of the model.
        weights: Parameters by name, as [`weights_of`] gives them.
        passes: How often the balancing is refined.
        lone: The length of what only one of two factors fills. It has no least norm, as it tends to zero; any length
            that is the same for the whole orbit will do, and a small one is near to what the slightest filling of the
            other factor would give.
    """
    refuse_shared_frames(config, "Balancing, on which canonical forms and alignment stand,")
    total = _without_translations(config, weights) @ flattening(config, weights)
    balanced = total.state_dict({name: tensor.to(torch.float64) for name, tensor in weights.items()})
    keys = {key: frame.group for key, frame in frame_keys(config).items()}
    for one_pass in range(passes):
        # Short lengths cost digits, so they come last.
        length = lone if one_pass == passes - 1 else 1.0
        elements = {}
        for key, roles in contract(config, balanced, balanced, lambda key: can_stretch(keys[key])).items():
            group = keys[key]
            if isinstance(group, MatrixGroup):
                elements[key] = balancing_matrices(group, roles, length)
            elif isinstance(group, NeuronGroup):
                elements[key] = balancing_scales(group, roles, length)
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


def balancing_matrices(group: MatrixGroup, grams: dict[Role, torch.Tensor], lone: float = 1.0) -> torch.Tensor:
    """Elements `[copies, n, n]` after which the charge is zero, from the Gram matrices `[copies, n, n]` by role."""
    vectors, covectors = grams["vector"], grams["covector"]
    if group.stretch == "none":
        return group.identity(len(vectors))
    if group.stretch == "common":
        metric = grams["metric"].diagonal(dim1=-2, dim2=-1).sum(-1)
        traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (vectors, covectors)]
        totals = zip(traces[0], traces[1], metric, strict=True)
        squares = torch.stack([_common_stretch(*values, lone) for values in totals])
        return group.identity(len(vectors)) * squares.sqrt()[:, None, None]
    return torch.stack([_balancing(group, *pair, lone) for pair in zip(vectors, covectors, strict=True)])


def _balancing(group: MatrixGroup, vectors: torch.Tensor, covectors: torch.Tensor, lone: float) -> torch.Tensor:
    first, second = group.pairs
    strengths = [gram[first, first] + gram[second, second] for gram in (vectors, covectors)]
    # As below, but one number per plane.
    scales = (or_one(strengths[1]) / or_one(strengths[0])) ** torch.where(strengths[0] * strengths[1] > 0, 0.25, 0.5)
    scales = scales * lone_length(strengths[0], strengths[1], lone)
    element = group.from_planes(torch.zeros_like(scales), scales)
    if group.rest:
        index = torch.tensor(group.rest)
        block = index[:, None], index
        # Of all that balance the symmetric positive one: it turns nothing, and is near 1 where little is to do.
        _, stretches, axes = torch.linalg.svd(contragredient(vectors[block], covectors[block], lone))
        element[block] = (axes.T * stretches) @ axes
    return element


def contragredient(vectors: torch.Tensor, covectors: torch.Tensor, lone: float = 1.0) -> torch.Tensor:
    """
    `M` `[n, n]` with `M A Mᵀ` and `M⁻ᵀ B M⁻¹` diagonal, for Gram matrices `A` of vectors and `B` of covectors.

    Where both fill a direction the two diagonals are equal: the singular values of the product of the two factors, in
    descending order (known from control theory as balancing, Moore 1981). Directions that only one of the two fills
    come next and get the length `lone` in that one; those that neither fills come last.
    """
    first, second = _factor(vectors), _factor(covectors)  # A = F Fᵀ, B = K Kᵀ
    left, values, right = torch.linalg.svd(first.T @ second)
    shared = int((values > RANK_TOLERANCE * values.max()).sum()) if values.numel() else 0
    roots = values[:shared].sqrt()
    # Directions that vectors fill, and forms that covectors are; those of one index are each other's duals.
    directions = first @ torch.cat([left[:, :shared] / roots, left[:, shared:] / lone], dim=1)
    forms = second @ torch.cat([right[:shared].T / roots, right[shared:].T / lone], dim=1)
    # Duals of the forms that no vector meets, and what is left; how these are chosen changes no weight.
    duals = torch.linalg.pinv(forms).T[:, shared:]
    used = torch.cat([forms, directions[:, shared:]], dim=1)
    complement = torch.linalg.svd(used, full_matrices=True).U[:, used.shape[1] :]
    return torch.linalg.inv(torch.cat([directions, duals, complement], dim=1))


def _factor(gram: torch.Tensor) -> torch.Tensor:
    """`F` `[n, rank]` with `F Fᵀ` the Gram matrix."""
    strengths, basis = torch.linalg.eigh(gram)
    filled = strengths > RANK_TOLERANCE * strengths[-1].clamp_min(1e-300)
    return basis[:, filled] * strengths[filled].sqrt()


def _common_stretch(
    vectors: torch.Tensor, covectors: torch.Tensor, metric: torch.Tensor, lone: float = 1.0
) -> torch.Tensor:
    """
    The square s of the stretch at which `s A - B/s + 2 s² C` vanishes, for `A = Σ|q|²`, `B = Σ|k|²`, `C = Σ λ²`.

    Newton's method on `log s`, in which the sum `s A + B/s + s² C` that it makes least is convex.
    """
    if covectors == 0 or vectors + metric == 0:
        return or_one(covectors) / or_one(vectors) * lone_length(vectors, covectors, lone) ** 2
    position = torch.zeros_like(vectors)
    for _ in range(100):
        up, down, weight = position.exp() * vectors, covectors / position.exp(), 2 * (2 * position).exp() * metric
        step = ((up - down + weight) / (up + down + 2 * weight)).clamp(-2, 2)
        position = position - step
        if step.abs() < 1e-15:
            break
    return position.exp()


def balancing_scales(group: NeuronGroup, norms: dict[Role, torch.Tensor], lone: float = 1.0) -> torch.Tensor:
    """
    The element of least norm among a layer's scalings of neurons, from `|.|²` `[1, F]` by role.

    Where one of a neuron's factors is empty there is no least norm: then what is filled gets the length `lone`, the
    column by the scaling of the factor that is empty.
    """
    down = norms["down"][0]
    ones = torch.ones_like(down)
    scales_active, scales_linear = group.allowed.tolist()
    degree = group.degree or 0
    active = norms["active"][0] if scales_active else ones
    linear = norms["linear"][0] if scales_linear else ones
    # Least `a² A + b² B + D / (a^2p b²)` where `a² A = p D'` and `b² B = D'`, D' being the last term.
    last = down * (linear if scales_linear else ones) * (active / max(degree, 1)) ** degree
    last = last ** (1 / (1 + degree + scales_linear))
    balanced = degree * last / or_one(active), last / or_one(linear)
    square = lone**2
    shortened = [torch.where(values > 0, values / square, ones) for values in (active, linear)]
    # Of the column, once the filled factors have that length.
    spare = down * shortened[0] ** degree * (shortened[1] if scales_linear else ones)
    spare = or_one(spare) / torch.where(spare > 0, square, 1.0)
    by_active = (active == 0) & scales_active & ~((linear == 0) & scales_linear)
    alone = (
        torch.where(by_active, spare ** (1 / max(degree, 1)), torch.where(active > 0, square / or_one(active), 1.0)),
        torch.where(linear > 0, square / or_one(linear), spare),
    )
    alive = (down > 0) & (active > 0) & (linear > 0)
    squares = [
        torch.where(alive, *pair) if allowed else ones
        for *pair, allowed in zip(balanced, alone, (scales_active, scales_linear), strict=True)
    ]
    return group.element(torch.arange(group.n), *(square.sqrt() for square in squares))


def lone_length(vectors: torch.Tensor, covectors: torch.Tensor, lone: float) -> torch.Tensor:
    """What a stretch is multiplied by so that vectors without covectors, or the other way round, get length `lone`."""
    one = torch.ones_like(vectors)
    only_covectors = torch.where((vectors == 0) & (covectors > 0), one / lone, one)
    return torch.where((vectors > 0) & (covectors == 0), one * lone, only_covectors)


def or_one(values: torch.Tensor) -> torch.Tensor:
    """`values`, and one in the place of zero."""
    return torch.where(values > 0, values, torch.ones_like(values))
