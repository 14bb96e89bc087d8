"""
Frames in which a model is rounded, as the table of frames allows them.

    stream      turned by a Hadamard matrix with random signs: no coordinate is longer than the others, so that a whole
                row can share a scale
    values      by P with `PᵀP = C⁻¹ # G`, the geometric mean, for the moments C of what the output map reads and its
                Gram matrix G: of all stretches, that with the least error of both together; then a Hadamard matrix
    neurons     by `(w²/h)^¼`, for the mean squares h of neurons and the squared lengths w² of what writes them

The last two follow from the same question as gains in closed form: errors of a matrix are `|columns|²` times the mean
squares of the inputs, each summed over a group, and `Σ w²/a² · Σ h a²` is least for `a⁴ = w²/h`. They pay where scales
belong to groups.
"""

from collections.abc import Mapping

import torch

from ..configuration_rigpt import RiGPTConfig
from ..frames import Frame, FrameKey, Table, table_of
from ..symmetry import GaugeTransformation
from ..table import NEURONS
from .hadamard import hadamard, known_hadamard


Elements = dict[FrameKey, torch.Tensor]
Weights = Mapping[str, torch.Tensor]
STREAM, VALUES = ("stream", "entry", "local"), "head_vo"
# Added to moments and Gram matrices of values, relative to their mean.
DAMPING = 1e-4


def hadamard_stream(config: RiGPTConfig, generator: torch.Generator | None = None) -> Elements:
    """
    Hadamard matrices for all frames of the stream.

    Raises:
        ValueError: if none of this width is known.
    """
    frames = table_of(config).frames
    return {key: _orthogonal(frames[key], generator) for key in frames if key.kind in STREAM}


def hadamard_values(config: RiGPTConfig, generator: torch.Generator | None = None) -> Elements:
    """Hadamard matrices for the values of all heads, where their group has them and one of their size is known."""
    frames = table_of(config).frames
    return {key: _orthogonal(frames[key], generator) for key in frames if key.kind == VALUES and _turns(frames[key])}


def _turns(frame: Frame) -> bool:
    """Whether a frame of values may be turned by a Hadamard matrix."""
    return frame.represents == "matrices" and known_hadamard(frame.group.shape(1)[-1]) is not None


def _orthogonal(frame: Frame, generator: torch.Generator | None) -> torch.Tensor:
    size = frame.group.shape(frame.copies)[-1]
    return torch.stack([hadamard(size, generator) for _ in range(frame.copies)])


@torch.no_grad()
def gauges_of_layer(
    config: RiGPTConfig,
    layer: int,
    weights: Weights,
    moments: Weights | None,
    generator: torch.Generator | None = None,
) -> Elements:
    """
    The gauges of values and neurons of one layer, as far as the groups of its frames allow them.

    Args:
        config, layer: Of the model, and the number of the layer.
        weights: The parameters of the model.
        moments: By the names of parameters, of what they read; without any, all directions of inputs count alike.
    """
    table = table_of(config)
    elements: Elements = {}
    for key, frame in table.frames.items():
        if key.layer != layer or not frame.group.stretches:
            continue
        roles = {turned.role for name, turned in table.walk(key) if name in weights}
        if key.kind == VALUES:
            stretch = _values(table, key, weights, moments)
            if stretch is not None:
                turn = _orthogonal(frame, generator) if _turns(frame) else frame.group.identity(frame.copies)
                elements[key] = turn.to(stretch) @ stretch
        elif "down" in roles and frame.carrier is None:
            elements[key] = _neurons(table, key, weights, moments)
    return elements


def _values(table: Table, key: FrameKey, weights: Weights, moments: Weights | None) -> torch.Tensor | None:
    """`P` `[copies, n, n]`."""
    frame = table.frames[key]
    written = read = None
    for name, turned in table.walk(key):
        if name not in weights or turned.role not in ("vector", "covector") or turned.stacked:
            continue
        matrix = weights[name].double()
        if turned.role == "covector":
            front = turned.unfold(matrix)
            read = frame.group.gram("covector", front, front, frame.copies)
            if moments is not None:
                # Of the inputs `x`: the sum over heads of the blocks of `Σ x xᵀ`.
                strengths, axes = torch.linalg.eigh(moments[name].double())
                root = axes * strengths.clamp_min(0).sqrt()
                written = frame.group.gram("covector", root, root, frame.copies)
        elif moments is None and matrix.dim() == 2 and turned.dim == 0:
            front = turned.unfold(matrix)
            written = frame.group.gram("vector", front, front, frame.copies)
    if written is None or read is None:
        return None
    square = geometric_mean(torch.linalg.inv(damped(written)), damped(read))
    return _power(square, 0.5)


def _neurons(table: Table, key: FrameKey, weights: Weights, moments: Weights | None) -> torch.Tensor:
    """The element that scales neurons, through whatever factors their activation lets pass."""
    frame = table.frames[key]
    group = frame.group
    lengths, squares = torch.ones(2, frame.copies, group.shape(1)[-1], dtype=torch.float64)
    for name, turned in table.walk(key):
        if name not in weights or turned.role not in NEURONS:
            continue
        front = turned.unfold(weights[name].double().cpu())
        gram = group.gram(turned.role, front, front, frame.copies)
        if turned.role == "down":
            lengths = gram
            if moments is not None:
                squares = moments[name].double().cpu().diagonal().reshape(frame.copies, -1)
        elif moments is None and weights[name].dim() == 2:
            squares = squares * gram
    stretch = 0.25 * (_positive(lengths).log() - _positive(squares).log())  # log a
    powers = group.exponents("down")  # columns of what reads get a⁻¹
    algebra = -stretch[:, None] * (powers / powers.square().sum())[:, None]
    return group.exp(algebra)


def _positive(values: torch.Tensor) -> torch.Tensor:
    """Kept away from zero, where there is nothing to be scaled."""
    return values.clamp_min(1e-6 * values.mean().clamp_min(1e-300))


def damped(matrices: torch.Tensor) -> torch.Tensor:
    """Positive definite `[copies, n, n]`, by a little of the identity."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    return matrices + DAMPING * mean[:, None, None] * eye


def geometric_mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`A # B`, the positive definite `S` with `S A⁻¹ S = B`, of stacks of positive definite matrices."""
    root, inverse = _power(a, 0.5), _power(a, -0.5)
    return root @ _power(inverse @ b @ inverse, 0.5) @ root


def _power(matrices: torch.Tensor, exponent: float) -> torch.Tensor:
    values, axes = torch.linalg.eigh((matrices + matrices.mT) / 2)
    return (axes * values.clamp_min(1e-300)[..., None, :] ** exponent) @ axes.mT


@torch.no_grad()
def turned_moments(undo: GaugeTransformation, name: str, moments: torch.Tensor) -> torch.Tensor:
    """
    The moments of what the parameter `name` reads after a transformation: for `W -> W Tᵀ`, `H -> T⁻ᵀ H T⁻¹`.

    Args:
        undo: The inverse of the transformation.
        name: A parameter with two axes, of which the second reads.
        moments (`torch.Tensor` of shape `[n, n]`): before it.
    """
    if not any(str(turned.key) in undo.elements and turned.dim == 1 for turned in undo.table.turns(name)):
        return moments
    if moments.dim() != 2:
        raise ValueError(f"`moments` of {name} must not be in blocks where its inputs turn, got {moments.dim()} axes.")
    eye = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    inverse = undo.turn_axis(name, 1, eye)
    scales = inverse.diagonal()
    if torch.equal(inverse, scales.diag()):  # as of neurons, of which there are many
        return (moments.double() * scales[:, None] * scales).to(moments.dtype)
    return (inverse.T @ moments.double() @ inverse).to(moments.dtype)


@torch.no_grad()
def gains_in_closed_form(
    config: RiGPTConfig, weights: Weights, moments: Weights | None = None
) -> dict[str, torch.Tensor]:
    """
    A gain per coordinate of the stream for every matrix that reads it: `(w²/h)^¼`, for squared columns w² and mean
    squares h of the inputs.

    Of all gains those with the least error of rounding to nearest; their geometric mean is 1.

    Args:
        config, weights: Of the model; matrices by the names of parameters, others are passed over.
        moments: By the names of parameters, of what they read; without any, all coordinates count alike.

    Returns:
        `dict[str, torch.Tensor]`: gains `[d]` by the names of parameters.
    """
    table, gains = table_of(config), {}
    for name, weight in weights.items():
        if any(turned.dim == 1 and turned.key.kind in STREAM for turned in table.turns(name)):
            squares = _positive(weight.double().square().sum(0))
            seen = (moments or {}).get(name)
            if seen is not None:
                squares /= _positive(seen.double().diagonal(dim1=-2, dim2=-1).flatten().to(squares.device))
            gain = squares**0.25
            gains[name] = gain / gain.log().mean().exp()
    return gains
