"""Orthogonal matrices: uniform sampling, exponential and logarithm, and rotary positions as one of their subgroups."""

import math
from typing import Any

import torch

from ..extras import needs


def haar(
    n: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    special: bool = False,
) -> torch.Tensor:
    """
    A random orthogonal matrix `[n, n]`, uniform with respect to the invariant (Haar) measure of O(n).

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q; without them the result is not uniform
    (Mezzadri, arXiv math-ph/0609050).

    Args:
        n: Size of the matrix.
        generator: Source of randomness; the global one if absent.
        dtype: The result's. The algebra is done in float64 and cast once.
        special: Determinant +1 only, i.e. uniform on SO(n). Otherwise both determinants are equally likely.

    Raises:
        ValueError: if `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    if special and torch.linalg.det(q) < 0:
        q[:, 0].neg_()
    return q.to(dtype)


def so_exp(skew: torch.Tensor) -> torch.Tensor:
    """Rotation `exp(A)` `[..., n, n]` of a skew-symmetric `A` `[..., n, n]`, determinant +1."""
    return torch.linalg.matrix_exp(skew)


def so_log(rotation: torch.Tensor) -> torch.Tensor:
    """
    The skew-symmetric `A` of smallest norm with `exp(A) = rotation`, both `[n, n]`, in float64.

    A real Schur decomposition splits the rotation into planes; each angle is read off its 2x2 block, so nothing is
    lost near 0 or π. Two half turns (eigenvalues -1) form one plane.

    Raises:
        ValueError: if the determinant is -1. No path inside O(n) joins such a matrix to the identity; see [`o_log`].
    """
    schur, basis, planes, alone = _planes(rotation)
    half_turns = [index for index in alone if schur[index, index] < 0]
    if len(half_turns) % 2:
        raise ValueError(
            "`rotation` must have determinant +1: a reflection is not joined to the identity by any path of "
            "orthogonal matrices. Draw it with `special=True`, or split the reflection off with `o_log`."
        )
    skew = torch.zeros_like(basis)
    for first, second in planes:
        angle = math.atan2(schur[second, first] - schur[first, second], schur[first, first] + schur[second, second])
        skew[second, first], skew[first, second] = angle, -angle
    for first, second in zip(half_turns[::2], half_turns[1::2], strict=True):
        skew[second, first], skew[first, second] = math.pi, -math.pi
    return basis @ skew @ basis.T


def o_log(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Coordinates of any orthogonal matrix `[n, n]`: a skew `A` and a sign `s` with `matrix = exp(A) diag(s, 1, ...)`.

    `s` is the determinant and says which of the two components of O(n) the matrix is in; for `s = 1` it is [`so_log`].
    """
    sign = -1 if torch.linalg.det(matrix.to(torch.float64)) < 0 else 1
    rotation = matrix.to(torch.float64).clone()
    rotation[:, 0] *= sign
    return so_log(rotation), sign


def rotary_form(skew: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Any one-parameter group of rotations `exp(p·A)` is RoPE in a suitable basis: its frequencies and that basis.

    A skew-symmetric matrix is, in some orthonormal basis, a sum of generators of rotations in perpendicular planes.
    Queries and keys written in that basis turn as rotary positions do, dimension i with i + h/2. That is why rotary
    positions with learned frequencies lose no generality among maps that queries and keys share; STRING (arXiv
    2502.02562) treats several commuting generators.

    Args:
        skew: The generator `A` `[h, h]`, h even.

    Returns:
        `frequencies` `[h/2]` in radians per position and an orthogonal `basis` `[h, h]`, such that `basis.T @ exp(p·A)
        @ basis` is the rotary rotation by `p · frequencies`.

    Raises:
        ValueError: if `h` is odd or `A` is not skew-symmetric.
    """
    size = len(skew)
    if size % 2 or not torch.allclose(skew, -skew.T):
        raise ValueError(
            f"`skew` must be skew-symmetric with an even number of rows, got {tuple(skew.shape)}. Use `A - A.T`."
        )
    schur, basis, planes, alone = _planes(skew)
    # Dimensions that turn in no plane have frequency 0, and may be paired in any way.
    planes += list(zip(alone[::2], alone[1::2], strict=True))
    frequencies = torch.tensor([schur[second, first] for first, second in planes], dtype=torch.float64)
    order = [first for first, _ in planes] + [second for _, second in planes]
    return frequencies, basis[:, order]


def _planes(matrix: torch.Tensor) -> tuple[Any, torch.Tensor, list[tuple[int, int]], list[int]]:
    """Real Schur form, its orthogonal basis, the planes it turns as pairs of indices, and the indices left over."""
    with needs("align"):
        from scipy.linalg import schur as real_schur

    schur, basis = real_schur(matrix.to(torch.float64).numpy(), output="real")
    planes: list[tuple[int, int]] = []
    alone, index = [], 0
    while index < len(schur):
        if index + 1 < len(schur) and schur[index + 1, index] != 0:
            planes.append((index, index + 1))
            index += 2
        else:
            alone.append(index)
            index += 1
    return schur, torch.from_numpy(basis), planes, alone
