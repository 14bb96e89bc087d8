"""
Linear neural ODEs `dx/dt = A(t) x`: how their generator changes under a spacetime diffeomorphism that is linear.

With `x' = Q(t) x` and `t' = tau(t)`

    A'(t') = (∂_t Q + Q A) Q^-1 / (d tau / dt),

the law of a connection in gauge theory: `d/dt - A` is a covariant derivative (Hashimoto, Hirono, Sannai, arXiv
2402.02362, for linear neural ODEs). `Q(t)` must be invertible for every t and C1.

    A, Q [d, d] as functions of t [];  x [..., d]
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from .diffeomorphism import Field, SpacetimeMap, TimeMap, flow, rate, same_time


MatrixPath = Callable[[Tensor], Tensor]
"""`t [] -> [d, d]`."""


def linear_field(generator: MatrixPath) -> Field:
    """The field `A(t) x`."""
    return lambda t, x: x @ generator(t).mT


def linear_map(
    matrix: MatrixPath,
    time: TimeMap = same_time,
    time_inverse: TimeMap | None = None,
    derivative: MatrixPath | None = None,
) -> SpacetimeMap:
    """The map `(t, x) -> (tau(t), Q(t) x)`; `derivative` is `∂_t Q`, by `torch.func` if absent."""

    def solve(t: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(matrix(t), y.reshape(-1, y.shape[-1]).mT).mT.reshape(y.shape)

    def tangent(t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        return velocity @ matrix(t).mT + x @ derivative(t).mT  # type: ignore[misc]

    return SpacetimeMap(time, lambda t, x: x @ matrix(t).mT, time_inverse, solve, tangent if derivative else None)


def transform_generator(
    generator: MatrixPath,
    matrix: MatrixPath | None = None,
    time: TimeMap = same_time,
    time_inverse: TimeMap | None = None,
) -> MatrixPath:
    """
    The generator `A'(t') = (∂_t Q + Q A) Q^-1 / (d tau / dt)` at `t = tau^-1(t')`, in closed form.

    Args:
        generator: `A(t)`.
        matrix: `Q(t)`; absent, only time changes and `A'(t') = A(t) / (d tau / dt)`.
        time: `tau`, increasing.
        time_inverse: Its inverse; found numerically if absent.

    Raises:
        ValueError: when it is evaluated where `time` does not increase.
    """
    clock = SpacetimeMap(time, time_inverse=time_inverse)

    def transformed(new_time: Tensor) -> Tensor:
        t = clock.invert_time(new_time)
        result = generator(t)
        if matrix is not None:
            q, velocity = jvp(matrix, (t,), (torch.ones_like(t),))
            result = torch.linalg.solve(q, velocity + q @ result, left=False)
        return result if time is same_time else result / rate(time, t)

    return transformed


def propagator(generator: MatrixPath, size: int, t0: float, t1: float, **solver: Any) -> Tensor:
    """
    The matrix `[size, size]` that takes `x(t0)` to `x(t1)`, in float64.

    Under a linear map it goes to `Q(t1) P Q(t0)^-1`. `solver` as in [`trajectory`].
    """
    return flow(linear_field(generator), torch.eye(size, dtype=torch.float64), t0, t1, **solver).mT
