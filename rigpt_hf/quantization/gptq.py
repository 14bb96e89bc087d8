"""
Rounding column by column, what a column loses made good by those after it (GPTQ: Frantar et al., arXiv 2210.17323).

Shapes: m outputs, n inputs; moments `[n, n]` of the inputs, or `[blocks, n / blocks, n / blocks]` where inputs of
different blocks never meet, as those of experts.
"""

import torch

from .grid import Codes, best_scales, check_grid, half, to_codes


# Added to the moments of the inputs, relative to their mean, so that directions never seen do not blow up.
DAMPING = 0.01
# Columns that are done before what they lose reaches those beyond.
BLOCK = 64


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    bits: int,
    group: int | None = None,
    *,
    damping: float = DAMPING,
    gain: torch.Tensor | None = None,
) -> Codes:
    """
    The matrix on the grid whose outputs are nearly those of `weight`, on inputs with these moments.

    A scale is chosen when its first column comes, from what is to be rounded then, by the diagonal of the moments.
    With moments that are a multiple of the identity this is [`rounded_codes`].

    Args:
        weight (`torch.Tensor` of shape `[m, n]`).
        moments (`torch.Tensor`): Second moments of the inputs.
        bits, group, gain: As of [`Codes`]; `gain` is taken out first.
        damping (`float`): Added to the diagonal, relative to its mean.

    Raises:
        ValueError: if the grid is impossible, or the moments do not fit or are not finite.
    """
    rows, width = weight.shape
    check_grid(bits, group, **{"the matrix": width})
    moments = moments if moments.dim() == 3 else moments[None]
    blocks, part = len(moments), moments.shape[-1]
    if blocks * part != width or moments.shape[1] != part:
        raise ValueError(f"`moments` must be [{width}, {width}], got {list(moments.shape)}.")
    check_grid(bits, group, **{"a block of the matrix": part})
    if not bool(moments.isfinite().all()):
        raise ValueError(
            "`moments` must be finite, got NaN or infinity. See whether the model's weights are finite, and calibrate "
            "in float32."
        )
    left = weight.T.to(torch.promote_types(weight.dtype, torch.float32), copy=True)  # [n, m]: columns in one piece
    importance = moments.diagonal(dim1=1, dim2=2).flatten().to(left)
    if gain is not None:
        gain = half(gain.to(left))
        left /= gain[:, None]
        importance = importance * gain.square()
        pairs = gain.reshape(blocks, part).to(moments)
        moments = moments * pairs[:, :, None] * pairs[:, None, :]
    if not bool((importance > 0).any()):
        importance = torch.ones_like(importance)
    scales, codes = left.new_empty(width // (group or width), rows), left.new_empty(width, rows)
    if group is None:
        scales[0] = best_scales(left.T, importance, bits)
    for index in range(blocks):
        span = slice(index * part, (index + 1) * part)
        inverse = _inverse_factor(moments[index], damping).to(left)
        _columns(left[span], codes[span], scales, inverse, importance[span], bits, group, index * part)
    stored = None if gain is None else gain.float()
    return Codes(codes.T.to(torch.int8).contiguous(), scales.T.float().contiguous(), bits, group, stored)


def _columns(
    left: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    inverse: torch.Tensor,
    importance: torch.Tensor,
    bits: int,
    group: int | None,
    start: int,
) -> None:
    """Round the columns `left` `[n, m]` one after another into `codes`, and choose the `scales` of groups."""
    width = len(left)
    # The first column of a group must have all that was lost before it, so a block is some whole groups.
    size = BLOCK if group is None else group * max(1, BLOCK // group)
    for begin in range(0, width, size):
        end = min(begin + size, width)
        lost = torch.empty_like(left[begin:end])
        for column in range(begin, end):
            if group is not None and (start + column) % group == 0:
                member = slice(column, column + group)
                scales[(start + column) // group] = best_scales(left[member].T, importance[member], bits)
            scale = scales[0 if group is None else (start + column) // group]
            codes[column] = to_codes(left[column], scale, bits)
            error = (left[column] - codes[column] * scale) / inverse[column, column]
            left[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1)
            lost[column - begin] = error
        left[end:] -= inverse[begin:end, end:].T @ lost


def _inverse_factor(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments, float64."""
    moments = moments.double()
    mean = float(moments.diagonal().mean())
    if mean <= 0:  # nothing was seen, so that no column can make good for another
        return torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    moments = moments / mean
    moments.diagonal().add_(damping)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
