"""Hadamard matrices: orthogonal, all entries of one size, so that what they turn has no outlying coordinates."""

import math

import torch


def known_hadamard(n: int) -> torch.Tensor | None:
    """
    An orthogonal `[n, n]` matrix with entries `±1/√n`, float64; `None` if no construction here gives one.

    A Kronecker product of Sylvester's matrix for a power of two with Paley's for a factor `q + 1` or `2 (q + 1)`, `q`
    an odd prime (Paley 1933).

    Raises:
        ValueError: if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    # The smallest of several factors leaves most to the power of two.
    for power in [2**k for k in range((n & -n).bit_length() - 1, -1, -1)]:
        rest = paley(n // power)
        if rest is not None:
            return torch.kron(sylvester(power), rest) / math.sqrt(n)
    return None


def hadamard(n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    [`known_hadamard`] after random signs, float64: `H diag(±1)`.

    Raises:
        ValueError: if no Hadamard matrix of this size is known here.
    """
    matrix = known_hadamard(n)
    if matrix is None:
        raise ValueError(
            f"`frame` must be 'own' for a width of {n}, for which no Hadamard matrix is known here, got 'hadamard'."
        )
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return matrix * signs


def sylvester(n: int) -> torch.Tensor:
    """A Hadamard matrix `[n, n]` of ±1, for `n` a power of two, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(n.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def paley(m: int) -> torch.Tensor | None:
    """A Hadamard matrix `[m, m]` of ±1 by one of Paley's constructions over a prime field; `None` if neither fits."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m % 4:
        return None
    q = m - 1
    if is_prime(q):  # then q = 3 mod 4, and the matrix of quadratic characters is skew
        skew = torch.zeros(m, m, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, characters(q)
        return skew + torch.eye(m, dtype=torch.float64)
    q = m // 2 - 1
    if is_prime(q) and q % 4 == 1:  # the matrix is symmetric
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, characters(q)
        plus, minus = torch.tensor([[[1.0, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def characters(q: int) -> torch.Tensor:
    """`[q, q]`: whether `i - j` is a square modulo the prime `q` (1), or not (-1), or zero."""
    table = -torch.ones(q, dtype=torch.float64)
    table[torch.arange(1, q) ** 2 % q] = 1
    table[0] = 0
    return table[(torch.arange(q)[:, None] - torch.arange(q)) % q]


def is_prime(n: int) -> bool:
    """By trial division, for widths of models."""
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
