"""The compact element of a group that brings one set of vectors nearest to another: orthogonal Procrustes problems."""

import torch
from scipy.optimize import linear_sum_assignment

from .groups import MatrixGroup


def nearest(group: MatrixGroup, cross: torch.Tensor, frequencies: torch.Tensor | None = None) -> torch.Tensor:
    """
    The rotations, reflections and exchanges `R` `[copies, n, n]` in `group` that make `tr(Rᵀ C)` largest.

    For `C = Σ b aᵀ` this brings the vectors a nearest to b. For O(n) it is the polar factor of C (Schönemann 1966),
    for a plane the angle of its rotation part, and planes that may change places are assigned to each other.

    Args:
        group: Its compact part is searched.
        cross: `C` `[copies, n, n]`.
        frequencies: `Σ b aᵀ` `[copies, planes, planes]` of the planes' frequencies, where planes may change places.
    """
    spare = [None] * len(cross) if frequencies is None else list(frequencies)
    return torch.stack([_nearest(group, *pair) for pair in zip(cross, spare, strict=True)])


def _nearest(group: MatrixGroup, cross: torch.Tensor, frequencies: torch.Tensor | None) -> torch.Tensor:
    moved = group.identity()[0]
    if group.movable:
        kept, mirrored = _plane_gains(group, cross)
        offset = torch.zeros_like(kept) if frequencies is None else frequencies
        kept, mirrored = kept + offset, mirrored - offset
        gains = torch.maximum(kept, mirrored)
        order = assignment(gains)
        moved = group.moved_planes(order, (mirrored > kept).gather(1, order[:, None])[:, 0])
        cross = cross @ moved.T
    first, second = group.pairs
    angles = torch.atan2(cross[second, first] - cross[first, second], cross[first, first] + cross[second, second])
    element = group.from_planes(angles, torch.ones_like(angles))
    if group.rest:
        index = torch.tensor(group.rest)
        block = index[:, None], index
        u, _, vt = torch.linalg.svd(cross[block])
        element[block] = u @ vt
    return element @ moved


def largest_trace(group: MatrixGroup, cross: torch.Tensor) -> torch.Tensor:
    """The largest `tr(Rᵀ C)` itself, `[...]` for `C` `[..., n, n]`: what matching these vectors can gain."""
    gain = torch.zeros(cross.shape[:-2], dtype=cross.dtype)
    if group.planes:
        kept, mirrored = _plane_gains(group, cross)
        if group.movable:
            flat = torch.maximum(kept, mirrored).reshape(-1, *kept.shape[-2:])
            best = [gains.gather(1, assignment(gains)[:, None]).sum() for gains in flat]
            gain = gain + torch.stack(best).reshape(gain.shape)
        else:
            gain = gain + kept.diagonal(dim1=-2, dim2=-1).sum(-1)
    if group.rest:
        index = torch.tensor(group.rest)
        gain = gain + torch.linalg.svdvals(cross[..., index[:, None], index]).sum(-1)
    return gain


def _plane_gains(group: MatrixGroup, cross: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of planes `[..., planes, planes]` the gain of the best rotation and of the best reflection."""
    first, second = group.pairs
    ii, ij, ji, jj = (cross[..., a[:, None], b] for a in (first, second) for b in (first, second))
    return torch.hypot(ii + jj, ji - ij), torch.hypot(ii - jj, ji + ij)


def assignment(gains: torch.Tensor) -> torch.Tensor:
    """
    The permutation `[n]` of columns that makes the sum of `gains[i, p[i]]` `[n, n]` largest.

    Where every row has its maximum in another column that is it already, and much quicker to see.
    """
    best = gains.argmax(dim=1)
    if len(best.unique()) == len(best):
        return best
    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.from_numpy(columns)
