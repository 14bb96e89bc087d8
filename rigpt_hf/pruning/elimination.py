"""
Which inputs of a linear map to leave out, and what the rest of the map makes good of it.

A map `W` `[m, n]` of inputs with second moments `C` errs by `tr(Δ C Δᵀ)` if it becomes `W + Δ`. With some inputs gone
the best `Δ` is a least-squares fit by those that stay, and its error follows from the inverse of `C` (optimal brain
surgeon, Hassibi and Stork 1993; of whole columns as in ZipLM, arXiv 2302.04089).
"""

from collections.abc import Callable

import torch


# Added to the moments, relative to their mean, so that inputs that were never seen do not blow up.
DAMPING = 1e-4
# Inputs that leave in one step, as a part of all: those of one step do not see each other leave.
STEP = 1 / 512


def eliminate(
    weight: torch.Tensor,
    moments: torch.Tensor,
    count: int,
    size: int = 1,
    groups: int = 1,
    tick: Callable[[int], object] = lambda count: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Leave out the units whose loss the others can make good best, one after the other.

    Args:
        weight: `[m, n]`, in float64.
        moments: `[n, n]`, second moments of the inputs.
        count: Units to leave out.
        size: Neighbouring inputs that make a unit: 1 for neurons, the size of a head for heads.
        groups: Neighbouring units in so many groups lose equally many each.
        tick: Called with the number of units that have just left.

    Returns:
        The units that stay, ascending, and `[m, n]` with zeros for the inputs of others and the rest fitted.
    """
    weight, units = weight.double().clone(), weight.shape[1] // size
    mean = moments.double().diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = moments.double() + DAMPING * mean * torch.eye(len(moments), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    stays = torch.ones(groups, units // groups, dtype=torch.bool)
    step = max(1, int(units * STEP)) if groups == 1 else 1
    left = count
    while left:
        number = min(step * groups, left)
        errors = torch.full((units,), torch.inf, dtype=torch.float64)
        alive = stays.flatten().nonzero().flatten()
        errors[alive] = _errors(weight, inverse, alive, size)
        gone = errors.view(groups, -1).topk(number // groups, largest=False).indices
        gone = (gone + torch.arange(groups)[:, None] * stays.shape[1]).flatten()
        _take_out(weight, inverse, (gone[:, None] * size + torch.arange(size)).flatten())
        stays.view(-1)[gone] = False
        left -= number
        tick(number)
    return stays.flatten().nonzero().flatten(), weight


def _errors(weight: torch.Tensor, inverse: torch.Tensor, units: torch.Tensor, size: int) -> torch.Tensor:
    """The error `tr(W_u (P_uu)⁻¹ W_uᵀ)` of each unit if it left alone; `P` is the inverse of the moments."""
    if size == 1:
        return weight[:, units].square().sum(dim=0) / inverse.diagonal()[units]
    inputs = units[:, None] * size + torch.arange(size)
    columns = weight[:, inputs].movedim(1, 0)  # [units, m, size]
    blocks = inverse[inputs[:, :, None], inputs[:, None, :]]
    return (columns.mT * torch.linalg.solve(blocks, columns.mT)).sum(dim=(1, 2))


def _take_out(weight: torch.Tensor, inverse: torch.Tensor, inputs: torch.Tensor) -> None:
    """Sets columns of a weight to zero, fits the others, and takes the inputs out of the inverse; in place."""
    block = torch.linalg.solve(inverse[inputs][:, inputs], inverse[inputs])  # [gone, n]
    weight -= weight[:, inputs] @ block
    inverse -= inverse[:, inputs] @ block
    weight[:, inputs] = 0.0
    inverse[:, inputs] = inverse[inputs] = 0.0
    inverse[inputs, inputs] = 1.0
