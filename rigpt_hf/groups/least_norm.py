"""
Points of least norm on orbits of stretches, in terms of Gram matrices: pure linear algebra behind `Group.balance`.

A is the Gram matrix of vectors, B that of covectors. Directions that only one of two factors fills are unpaired: they
have no least norm, as it tends to zero, and get a length that the caller chooses.
"""

import torch


# Singular values below this part of the largest are taken for zero.
RANK_TOLERANCE = 1e-12
# Sums of two Gram eigenvalues below this share of the largest move no weight.
EMPTY = 1e-14


def contragredient(vectors: torch.Tensor, covectors: torch.Tensor, unpaired: float = 1.0) -> torch.Tensor:
    """
    `M` `[n, n]` with `M A Mᵀ` and `M⁻ᵀ B M⁻¹` diagonal, for Gram matrices `A` of vectors and `B` of covectors.

    Where both fill a direction the two diagonals are equal: the singular values of the product of the two factors, in
    descending order (known from control theory as balancing, Moore 1981). Directions that only one of the two fills
    come next and get the length `unpaired` in that one; those that neither fills come last.
    """
    first, second = _factor(vectors), _factor(covectors)  # A = F Fᵀ, B = K Kᵀ
    left, values, right = torch.linalg.svd(first.T @ second)
    shared = int((values > RANK_TOLERANCE * values.max()).sum()) if values.numel() else 0
    roots = values[:shared].sqrt()
    # Directions that vectors fill, and forms that covectors are; those of one index are each other's duals.
    directions = first @ torch.cat([left[:, :shared] / roots, left[:, shared:] / unpaired], dim=1)
    forms = second @ torch.cat([right[:shared].T / roots, right[shared:].T / unpaired], dim=1)
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


def plane_stretches(vectors: torch.Tensor, covectors: torch.Tensor, unpaired: float = 1.0) -> torch.Tensor:
    """The same with one number per plane `[planes]`: stretches after which `|vectors|²` and `|covectors|²` agree."""
    powers = torch.where(vectors * covectors > 0, 0.25, 0.5)
    return (or_one(covectors) / or_one(vectors)) ** powers * unpaired_scale(vectors, covectors, unpaired)


def common_stretch(
    vectors: torch.Tensor, covectors: torch.Tensor, metric: torch.Tensor, unpaired: float = 1.0
) -> torch.Tensor:
    """
    The square s of the stretch at which `s A - B/s + 2 s² C` vanishes, for `A = Σ|q|²`, `B = Σ|k|²`, `C = Σ λ²`.

    Newton's method on `log s`, in which the sum `s A + B/s + s² C` that it makes least is convex.
    """
    if covectors == 0 or vectors + metric == 0:
        return or_one(covectors) / or_one(vectors) * unpaired_scale(vectors, covectors, unpaired) ** 2
    position = torch.zeros_like(vectors)
    for _ in range(100):
        up, down, weight = position.exp() * vectors, covectors / position.exp(), 2 * (2 * position).exp() * metric
        step = ((up - down + weight) / (up + down + 2 * weight)).clamp(-2, 2)
        position = position - step
        if step.abs() < 1e-15:
            break
    return position.exp()


def sylvester(vectors: torch.Tensor, covectors: torch.Tensor, charge: torch.Tensor) -> torch.Tensor:
    """The smallest X `[copies, n, n]` with `X A + B X = -Q`, for the charge `Q = A - B`."""
    (a, right), (b, left) = torch.linalg.eigh(vectors), torch.linalg.eigh(covectors)
    sums = b.clamp_min(0)[:, :, None] + a.clamp_min(0)[:, None, :]
    filled = sums > EMPTY * sums.amax(dim=(1, 2), keepdim=True)
    inner = left.mT @ charge @ right
    return -left @ torch.where(filled, inner / sums, 0.0) @ right.mT


def unpaired_scale(vectors: torch.Tensor, covectors: torch.Tensor, unpaired: float) -> torch.Tensor:
    """The stretch of vectors without covectors, or covectors without vectors, to the length `unpaired`."""
    one = torch.ones_like(vectors)
    only_covectors = torch.where((vectors == 0) & (covectors > 0), one / unpaired, one)
    return torch.where((vectors > 0) & (covectors == 0), one * unpaired, only_covectors)


def or_one(values: torch.Tensor) -> torch.Tensor:
    """`values`, and one in the place of zero."""
    return torch.where(values > 0, values, torch.ones_like(values))
