"""Merging models: align, then average; and what the loss does on the way from one model to the other."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..checkpoints.weights import check_made
from .alignment import Alignment, check_alike, check_same_parameters, find_alignment
from .contraction import Weights, decomposable, weights_of


METHODS = ("linear", "spherical")
# A spherical mean of more than two needs a few steps; of two it is there after one.
STEPS, PRECISE = 100, 1e-14


@torch.no_grad()
@decomposable()
def merge(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    method: str = "linear",
    aligned: bool = True,
    alignments: Sequence[Alignment] | None = None,
    progress: bool = False,
) -> nn.Module:
    """
    The average of several models, once they are brought into the frames of the first.

    The average is taken between balanced weights (`balance.py`), so that neither the result's function nor its
    quality depends on the frames that the models come in, and is then put into the frames of the first: with weights
    (1, 0) it is the first model.

    Args:
        models: RiGPTs of one configuration.
        weights: Share of each model; they must sum to 1. Equal shares if not given.
        method: `"linear"`, or `"spherical"`: along the great circle between parameters of one name, for more than two
            models their Karcher mean, and the norms linearly.
        aligned: Align first. Without, this is the ordinary average of the unaligned weights.
        alignments: Of all models but the first, in their order, with the first, where they are known already: by
            [`find_learned_alignment`] on text.
        progress: Show a progress bar.

    Returns:
        A new model of the first one's dtype, without the record of a token symmetry, which only
        `Representation.distance` can tell whether it still has; the others stay as they are.

    Raises:
        ValueError: if there are fewer than two models, the weights do not fit, shapes or options differ, or numbers of
            the average leave the range of the dtype.
    """
    parts = check_weights(models, weights, method)
    first = models[0]
    for model in models[1:]:
        check_alike(model.config, first.config)
        check_same_parameters(model, first)
    if alignments is not None and (not aligned or len(alignments) != len(models) - 1):
        raise ValueError(
            f"`alignments` must be one of each model but the first, {len(models) - 1}, with `aligned=True`, got "
            f"{len(alignments)} with `aligned={aligned}`. Leave them out to align here."
        )
    if aligned:
        if alignments is None:
            alignments = [find_alignment(model, first, progress=progress) for model in models[1:]]
        mean = average([alignments[0].reference, *(side.aligned for side in alignments)], parts, method)
        mean = alignments[0].to_balanced.inverse().state_dict(mean)
    else:
        mean = average([weights_of(model) for model in models], parts, method)
    merged = with_weights(first, mean)
    advice = f"Their shares are {parts}: take some nearer to those of a mean, or see whether a model is damaged."
    check_made(merged.state_dict(), "models", advice)
    return merged


def check_weights(models: Sequence[nn.Module], weights: Sequence[float] | None, method: str) -> list[float]:
    """The weights to use; a `ValueError` if there are too few models, or the weights do not fit them or the method."""
    if len(models) < 2:
        raise ValueError(f"`models` must be at least two, got {len(models)}. Add another.")
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    parts = [1 / len(models)] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(parts) != len(models):
        raise ValueError(f"`weights` must be {len(models)} numbers, one per model, got {parts}. Give {len(models)}.")
    if not abs(sum(parts) - 1) <= 1e-6:  # NaN compares false
        raise ValueError(f"`weights` must sum to 1, got {parts}, whose sum is {sum(parts):g}. Divide them by it.")
    if method == "spherical" and min(parts) < 0:
        raise ValueError(f"`weights` must not be negative for `method='spherical'`, got {parts}. Use 'linear'.")
    return parts


def average(models: Sequence[Weights], parts: Sequence[float], method: str) -> dict[str, torch.Tensor]:
    """The average of weights by parameter name, as they are."""
    result = {}
    for name in models[0]:
        tensors = torch.stack([model[name].to(torch.float64) for model in models])
        portions = torch.tensor(list(parts), dtype=torch.float64).reshape(-1, *[1] * (tensors.dim() - 1))
        linear = (portions * tensors).sum(dim=0)
        result[name] = linear if method == "linear" else _spherical(tensors, portions, linear)
    return result


def _spherical(tensors: torch.Tensor, portions: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """The Karcher mean of directions times the mean of norms; `linear` where a tensor, or the mean, has none."""
    flat, share = tensors.flatten(1), portions.flatten()
    norms = flat.norm(dim=1)
    if (norms == 0).any() or linear.norm() <= PRECISE * norms.max():
        return linear
    directions = flat / norms[:, None]
    mean = linear.flatten() / linear.norm()
    for _ in range(STEPS):
        cosines = (directions @ mean).clamp(-1, 1)
        tangents = directions - cosines[:, None] * mean
        sines = tangents.norm(dim=1)
        angles = torch.atan2(sines, cosines)
        # Logarithms on the sphere: the tangent to each direction, as long as the arc.
        step = (share * torch.where(sines > PRECISE, angles / sines.clamp_min(PRECISE), 1.0)) @ tangents
        length = step.norm()
        if length < PRECISE:
            break
        mean = length.cos() * mean + length.sin() * step / length
        mean = mean / mean.norm()
    return ((share * norms).sum() * mean).reshape(linear.shape)


@torch.no_grad()
def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy of a model with other weights, cast once; tied parameters stay tied, and no symmetry is recorded."""
    result = copy.deepcopy(model)
    result.config.token_symmetry = None
    for name, parameter in result.named_parameters():
        parameter.copy_(weights[name])
    return result


@dataclass
class LossPath:
    """
    The loss on the straight path from B (`t = 0`) to A (`t = 1`), before and after alignment.

    Args:
        t (`list[float]`): where.
        before, after (`list[float]`): losses in nats per token with A's weights as they are, and aligned with B.
        learned (`list[float]`, *optional*): losses after an alignment that was learned on text.
    """

    t: list[float]
    before: list[float]
    after: list[float]
    learned: list[float] | None = None

    @property
    def barrier_before(self) -> float:
        """The largest loss above the straight line between the two ends, in nats per token, before alignment."""
        return self._barrier(self.before)

    @property
    def barrier_after(self) -> float:
        """The same after alignment."""
        return self._barrier(self.after)

    @property
    def barrier_learned(self) -> float | None:
        """The same after learned alignment, if there was one."""
        return None if self.learned is None else self._barrier(self.learned)

    def reversed(self) -> "LossPath":
        """The same path, from A (`t = 0`) to B (`t = 1`)."""
        learned = self.learned and self.learned[::-1]
        return LossPath([1 - t for t in reversed(self.t)], self.before[::-1], self.after[::-1], learned)

    def _barrier(self, losses: list[float]) -> float:
        return max(loss - (1 - t) * losses[0] - t * losses[-1] for t, loss in zip(self.t, losses, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        barriers = {f"barrier_{name}": getattr(self, f"barrier_{name}") for name in ("before", "after", "learned")}
        return {name: value for name, value in (asdict(self) | barriers).items() if value is not None}


@torch.no_grad()
def loss_path(
    a: nn.Module,
    b: nn.Module,
    loss: Callable[[nn.Module], float],
    *,
    points: int = 11,
    learned: Alignment | None = None,
    progress: bool = False,
) -> LossPath:
    """
    The loss along the straight path between two models, before and after aligning A with B.

    Args:
        a, b: RiGPTs of one configuration.
        loss: Gives the loss of a model, in nats per token.
        points: Number of points, both ends included.
        learned: An alignment of A with B by [`find_learned_alignment`], to be measured besides.
        progress: Show progress bars.

    Raises:
        ValueError: if `points` is less than 2, or shapes or options differ.
    """
    if points < 2:
        raise ValueError(f"`points` must be at least 2, the two ends, got {points}.")
    grid = [index / (points - 1) for index in range(points)]
    paths = {"before": (weights_of(b), weights_of(a)), "after": _ends(find_alignment(a, b, progress=progress))}
    if learned is not None:
        paths["learned"] = _ends(learned)
    losses: dict[str, list[float]] = {name: [] for name in paths}
    with tqdm(total=len(paths) * points, desc="Losses on the way", disable=not progress) as bar:
        for name, ends in paths.items():
            for t in grid:
                losses[name].append(float(loss(with_weights(b, average(ends, [1 - t, t], "linear")))))
                bar.update()
    return LossPath(grid, **losses)


def _ends(alignment: Alignment) -> tuple[Weights, Weights]:
    """The reference's and the aligned model's weights, in the reference's own frames."""
    back = alignment.to_balanced.inverse()
    return back.state_dict(alignment.reference), back.state_dict(alignment.aligned)
