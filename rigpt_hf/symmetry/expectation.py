"""Distances to be expected between two models: unaligned, and by rounding alone."""

import torch

from ..checkpoints.opened import OpenedModel, finest_dtype
from ..configuration_rigpt import RiGPTConfig
from .action import GaugeTransformation
from .alignment import UNPAIRED, Search
from .balance import balance
from .contraction import Weights
from .layered import Distances, Found


# From coarse to fine.
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


def unaligned(a: OpenedModel, b: OpenedModel) -> tuple[dict[str, float], list[torch.dtype], bool]:
    """
    Relative distances of two unaligned models by part, the coarsest dtypes that hold the weights of each, and whether
    all weights are equal.
    """
    distances, is_same = Distances(), True
    for name in a.weights.shapes:
        pair = [side.weights.read(name) for side in (a, b)]
        is_same = is_same and torch.equal(*pair)
        distances.add({name: pair[0]}, {name: pair[1]})
    return distances.relative(), [precision_of(side) for side in (a, b)], is_same


def precision_of(model: OpenedModel) -> torch.dtype:
    """The coarsest dtype that holds all weights of a model, as they are stored: a conversion may have folded them."""
    weights = model.weights if model.stored is None else model.stored.weights()
    stored = {name: dtype for name, dtype in weights.dtypes.items() if dtype.is_floating_point}
    finest, left = finest_dtype(stored), list(PRECISIONS)
    for name in stored:
        if not left or left[0] == finest:  # which holds them all
            break
        tensor = weights.read(name)
        left = [dtype for dtype in left if _holds(dtype, tensor)]
    return left[0] if left else torch.float64


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a dtype has all numbers of a tensor."""
    return tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def rounding(found: Found, b: OpenedModel, precisions: list[torch.dtype]) -> dict[str, float]:
    """
    The distances that casting would cause: of A in the frames of B to the precision of B, and the other way round.

    The coarser of the two decides; both count where they are alike. Every layer is aligned again by itself, as
    balancing is not linear.
    """
    coarsest = max(torch.finfo(precision).eps for precision in precisions)
    to_b = found.theirs.transformation.inverse()
    to_a, config = found.transformation.inverse(), b.config
    squares: dict[str, float] = {}
    for index, precision in enumerate(precisions):
        if 4 * torch.finfo(precision).eps < coarsest:
            continue
        distances = Distances()
        for block in found.theirs.blocks:
            there = found.aligned(block) if index else _double(found.theirs.raw(block))
            distances.add(*_cast(config, (to_b if index else to_a).state_dict(there), precision))
        for name, value in distances.relative().items():
            squares[name] = squares.get(name, 0.0) + value**2
    return {name: square**0.5 for name, square in squares.items()}


def _double(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


def _cast(config: RiGPTConfig, weights: Weights, precision: torch.dtype) -> tuple[Weights, Weights]:
    """Balanced weights after a cast, and before it."""
    cast = {name: tensor.to(precision).to(torch.float64) for name, tensor in weights.items()}
    # In these frames weights may be larger than in those that they are stored in.
    rounded = {name: torch.where(tensor.isfinite(), tensor, weights[name]) for name, tensor in cast.items()}
    flat = GaugeTransformation.identity(config)
    balanced = [balance(config, side, passes=1, unpaired=UNPAIRED, flat=flat)[1] for side in (rounded, weights)]
    search = Search(config, *balanced)
    search.sweep(match=False, but=("stream", "local"))
    return search.weights, search.target
