"""
Gauge transformations of a feedforward net, lifted to diffeomorphisms of the neural ODE that continues it.

Layers `x_{l+1} = F_l(x_l)` of one width d; elements `G_0 ... G_L` of GL(d) between them:

    F_l' = G_{l+1} F_l G_l^-1        the same function if G_0 = G_L = 1

The neural ODE has `F_l` as its flow from t = l to l + 1. The lift is a path `Q(t)` of linear diffeomorphisms with
`Q(l) = G_l`; the diagram that commutes:

    layers ── transformed by G ──▶ layers'
      │                              │          time-l maps of the lifted ODE = products of the layers'
    the ODE ── lifted by Q(t) ───▶ the ODE'

That feedforward redundancies lift is in Hashimoto, Hirono, Sannai, arXiv 2402.02362. Its conditions:

- A flow is invertible and keeps orientation. So a layer is a flow only if it does: `det W > 0`, leaky ReLU instead of
  ReLU, no change of width. ReLU is the limit of slope 0, which no flow reaches.
- `W = exp(A)` with one real `A` need not exist for `det W > 0`: diag(-1, -2) has no real logarithm (Culver 1966). A
  path of matrices always does, so the field here depends on time inside a layer.
- GL(d) has two components. A path joins `G_l` and `G_{l+1}` only if their determinants have the same sign, hence with
  `G_0 = 1` only determinants above 0 lift: half of all permutations do not. With d more coordinates, at 0, that carry
  the missing sign, all do (`double`; one would be enough). The extra space is that of augmented neural ODEs (Dupont,
  Doucet, Teh, arXiv 1904.01681).
- Between layers `Q(t)` of a permutation is a rotation and no permutation. It commutes with no ReLU, which the ODE does
  not need: a lift is a symmetry of the flow, not of the net half-way.
- The diagram holds for flows. Euler steps of length 1 of a lifted residual net are not the transformed net, as they do
  not see `∂_t Q`; there the skip path has to carry `G_{l+1} G_l^-1`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..symmetry import so_exp, so_log
from .diffeomorphism import Field, SpacetimeMap, trajectory, transform_field
from .linear_field import linear_map


def smooth_step(s: Tensor) -> Tensor:
    """From 0 to 1 on [0, 1], constant outside, with first and second derivatives 0 at both ends (C2; Perlin 2002)."""
    s = s.clamp(0, 1)
    return s**3 * (10 + s * (6 * s - 15))


def smooth_rate(s: Tensor) -> Tensor:
    """The derivative of [`smooth_step`]."""
    s = s.clamp(0, 1)
    return 30 * (s * (1 - s)) ** 2


class JoiningPath:
    """
    The path `s -> [n, n]` in GL(n) from the identity (`s = 0`) to `element` (`s = 1`), and its `derivative`.

    Polar decomposition `element = R S`; the path is `exp(s log R) S^s`, so a rotation goes along its geodesic and a
    positive scaling along the exponential of its logarithms.

    Raises:
        ValueError: if the determinant of `element` is not positive.
    """

    def __init__(self, element: Tensor):
        element = element.to(torch.float64)
        if _sign(element, "element") < 0:
            raise ValueError(
                f"`element` must have a positive determinant, got {torch.linalg.det(element).item():.3g}: no path of "
                "invertible matrices joins it to the identity. Double the space with `doubled`."
            )
        u, stretch, vt = torch.linalg.svd(element)
        self.turn, self.logarithms, self.axes = so_log(u @ vt), stretch.log(), vt

    def __call__(self, s: Tensor) -> Tensor:
        return self.value(*self.factors(s))

    def derivative(self, s: Tensor) -> Tensor:
        """`log(R) R^s S^s + R^s log(S) S^s`."""
        return self.rate(*self.factors(s))

    def factors(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """`R^s`, and `S^s` before its last factor, each `[n, n]`: what takes time in the value and its derivative."""
        return so_exp(s * self.turn), self.axes.mT * torch.exp(s * self.logarithms)

    def value(self, rotation: Tensor, stretch: Tensor) -> Tensor:
        """The point of the path with these [`factors`]."""
        return rotation @ stretch @ self.axes

    def rate(self, rotation: Tensor, stretch: Tensor) -> Tensor:
        """The derivative by s at the point with these [`factors`]."""
        return (self.turn @ rotation @ stretch + rotation @ (stretch * self.logarithms)) @ self.axes


def doubled(matrix: Tensor) -> Tensor:
    """`[2n, 2n]`: `matrix` `[n, n]` on the first n coordinates, diag(sign of its determinant, 1, ...) on the rest."""
    block = torch.eye(len(matrix), dtype=matrix.dtype)
    block[0, 0] = _sign(matrix, "matrix")
    return torch.block_diag(matrix, block)


class LiftPath:
    """
    A C2 path `t -> Q(t)` of invertible matrices with `Q(l) = elements[l]`, constant before the first and after the
    last, and its `derivative`.

    From l to l + 1 it is the [`JoiningPath`] of `G_{l+1} G_l^-1`, times `G_l`, at the pace of [`smooth_step`]: `∂_t Q`
    vanishes at every layer.

    Args:
        elements: `G_0 ... G_L`, each `[d, d]`.
        double: Let all of them act on `[2d, 2d]`, see [`doubled`].

    Raises:
        ValueError: if there are fewer than two, one is singular, or their determinants differ in sign and `double` is
            off.
    """

    def __init__(self, elements: Sequence[Tensor], double: bool = False):
        if len(elements) < 2:
            raise ValueError(f"`elements` must be at least two, one at each end, got {len(elements)}. Add identities.")
        elements = [element.to(torch.float64) for element in elements]
        signs = [_sign(element, f"elements[{index}]") for index, element in enumerate(elements)]
        if double:
            elements = [doubled(element) for element in elements]
        elif len(set(signs)) > 1:
            index = next(index for index, sign in enumerate(signs) if sign != signs[0])
            raise ValueError(
                f"`elements` must have determinants of one sign, got {signs[0]:+d} for elements[0] and "
                f"{signs[index]:+d} for elements[{index}]: no path of invertible matrices joins them. Pass "
                "`double=True`."
            )
        self.elements = elements
        self.steps = [
            JoiningPath(torch.linalg.solve(before, after, left=False))
            for before, after in itertools.pairwise(elements)
        ]
        self._last: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, t: Tensor) -> Tensor:
        index, factors = self._at(t)
        return self.steps[index].value(*factors) @ self.elements[index]

    def derivative(self, t: Tensor) -> Tensor:
        """`∂_t Q`."""
        index, factors = self._at(t)
        return smooth_rate(t - index) * self.steps[index].rate(*factors) @ self.elements[index]

    def _at(self, t: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
        """The step that `t` is in, and its factors, computed once for a map, its inverse and its tangent."""
        if self._last is None or self._last[0] is not t:
            index = _interval(t, len(self.steps))
            self._last = (t, index, self.steps[index].factors(smooth_step(t - index)))
        return self._last[1:]


def lift(elements: Sequence[Tensor], double: bool = False) -> SpacetimeMap:
    """
    The diffeomorphism `(t, x) -> (t, Q(t) x)` of the ODE that continues the gauge transformation `G_0 ... G_L`.

    It is the identity at both ends if `G_0` and `G_L` are; arguments and what raises as in [`LiftPath`].
    """
    path = LiftPath(elements, double)
    return linear_map(path, derivative=path.derivative)


@dataclass(frozen=True)
class Layer:
    """
    `x -> act(W x + b)` as the flow over one unit of time: the affine part in its first half, `act` in the second.

    Args:
        weight: `W` `[d, d]`.
        bias: `b` `[d]`.
        slope: `act(z)` is `z` above 0 and `slope · z` below: 1 is linear, less is leaky ReLU.

    Raises:
        ValueError: if `slope` is not positive.
    """

    weight: Tensor
    bias: Tensor
    slope: float = 1.0

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(
                f"`slope` must be positive, got {self.slope}: ReLU sends all negative numbers to one, which no flow "
                "does. Take a small slope."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., d]`."""
        z = x @ self.weight.mT + self.bias
        return torch.where(z > 0, z, self.slope * z)

    def transformed(self, before: Tensor, after: Tensor) -> "Layer":
        """
        The layer `after ∘ F ∘ before^-1`, by its weights: `W' = after W before^-1`, `b' = after b`.

        Raises:
            ValueError: if `act` does not commute with `after`: leaky ReLU asks for a permutation times a positive
                scaling; a linear layer for nothing.
        """
        if self.slope != 1 and not _is_positive_monomial(after):
            raise ValueError(
                f"`after` must be a permutation times a positive scaling where the layer is not linear, got a "
                f"{len(after)} x {len(after)} matrix with {int((after != 0).sum())} entries that are not zero and the "
                f"least {after.min().item():.3g}. Rotate linear layers only."
            )
        return Layer(torch.linalg.solve(before, after @ self.weight, left=False), after @ self.bias, self.slope)


def affine_map(weight: Tensor, bias: Tensor) -> SpacetimeMap:
    """
    The path of maps `x -> W(s) x + s b` from the identity (`t = 0`) to `W x + b` (`t = 1`); s is [`smooth_step`] of t.

    Raises:
        ValueError: if the determinant of `weight` is not positive.
    """
    path = LiftPath([torch.eye(len(weight)), weight])
    linear = linear_map(path)
    return SpacetimeMap(
        space=lambda t, x: linear.space(t, x) + smooth_step(t) * bias,
        space_inverse=lambda t, y: linear.invert_space(t, y - smooth_step(t) * bias),
        tangent=lambda t, x, v: linear.space(t, v) + x @ path.derivative(t).mT + smooth_rate(t) * bias,
    )


def leaky_relu_map(slope: float, size: int | None = None) -> SpacetimeMap:
    """
    The path of maps `x -> max(x, slope^s x)` from the identity to leaky ReLU, on the first `size` coordinates.

    Its field is `ds/dt log(slope) min(x, 0)`: what is below 0 decays, and never reaches it.
    """

    def factor(t: Tensor, x: Tensor, exponent: float) -> Tensor:
        below = x < 0
        below[..., size or x.shape[-1] :] = False
        return torch.where(below, torch.exp(exponent * smooth_step(t)), 1.0)

    exponent = math.log(slope)

    def tangent(t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        grown = factor(t, x, exponent)
        return grown * velocity + torch.where(grown == 1, 0.0, exponent * smooth_rate(t) * grown * x)

    return SpacetimeMap(
        space=lambda t, x: x * factor(t, x, exponent),
        space_inverse=lambda t, y: y * factor(t, y, -exponent),
        tangent=tangent,
    )


def field_of_path(path: SpacetimeMap) -> Field:
    """
    The field whose flow is `path`: the image of the field 0, `∂_t phi` at the preimage.

    So the ODE of an invertible net is pure gauge: a diffeomorphism makes it from nothing. It is the identity at its
    start only, or else the net would be the identity too.
    """
    return transform_field(lambda t, x: torch.zeros_like(x), path)


def network_field(layers: Sequence[Layer], double: bool = False) -> Field:
    """
    A field on `[..., d]` whose flow from t = l to l + 1 is `layers[l]`. It is C1 in time, and 0 at every layer.

    Between multiples of 1/2 it is smooth in time; a solver of high order is faster if it stops there (`jumps`).

    With `double`, on `[..., 2d]`: where the other coordinates are 0 they stay 0, and the flow is that of the layers.

    Raises:
        ValueError: if a weight is singular, or its determinant is negative and `double` is off.
    """
    stages = []
    for index, layer in enumerate(layers):
        if not double and _sign(layer.weight, f"layers[{index}].weight") < 0:
            raise ValueError(
                f"`layers[{index}].weight` must have a positive determinant, got "
                f"{torch.linalg.det(layer.weight).item():.3g}: a flow keeps orientation. Pass `double=True`."
            )
        weight = doubled(layer.weight) if double else layer.weight
        bias = torch.cat([layer.bias, torch.zeros_like(layer.bias)]) if double else layer.bias
        stages.append(field_of_path(affine_map(weight, bias)))
        stages.append(field_of_path(leaky_relu_map(layer.slope, len(layer.bias))))

    def field(t: Tensor, x: Tensor) -> Tensor:
        index = _interval(2 * t, len(stages))
        return 2 * stages[index](2 * t - index, x)

    return field


def piecewise_field(fields: Sequence[Callable[[Tensor], Tensor]]) -> Field:
    """
    The field of a residual net: `fields[l](x)` for t from l to l + 1, whose Euler steps are `x + fields[l](x)`.

    It jumps at the layers: integrate with `jumps=range(len(fields) + 1)`.
    """
    return lambda t, x: fields[_interval(t, len(fields))](x)


def commutation_errors(
    layers: Sequence[Layer], elements: Sequence[Tensor], x: Tensor, *, double: bool = False, **solver: Any
) -> list[float]:
    """
    The diagram at the head of this file: lift and take the time-l maps, against transform the weights and multiply.

    Args:
        layers: `F_0 ... F_{L-1}`.
        elements: `G_0 ... G_L`; those after a layer that is not linear permute and scale.
        x: Inputs `[..., d]` of the net before it is transformed, so that `G_0 x` are those after.
        double: As in [`LiftPath`].
        solver: As in [`trajectory`].

    Returns:
        For l = 0 ... L, the largest difference, relative to the largest value there.

    Raises:
        ValueError: if the numbers do not fit, or as in [`LiftPath`], [`network_field`] and [`Layer.transformed`].
    """
    if len(elements) != len(layers) + 1:
        raise ValueError(
            f"`elements` must be one more than `layers`, got {len(elements)} and {len(layers)}. Add one for each end."
        )
    wanted = [x @ elements[0].mT]
    for layer, before, after in zip(layers, elements[:-1], elements[1:], strict=True):
        wanted.append(layer.transformed(before, after)(wanted[-1]))
    if double:
        wanted = [torch.cat([state, torch.zeros_like(state)], -1) for state in wanted]
    lifted = transform_field(network_field(layers, double), lift(elements, double))
    halves = [index / 2 for index in range(2 * len(layers))]
    states = trajectory(lifted, wanted[0], range(len(elements)), **({"jumps": halves} | solver))
    return [((state - want).abs().max() / want.abs().max()).item() for state, want in zip(states, wanted, strict=True)]


def _interval(t: Tensor, count: int) -> int:
    """The index of the interval of length 1 that `t` is in, of `count` from 0 on; the outermost have no outer end."""
    return min(max(math.floor(float(t.detach())), 0), count - 1)


def _sign(matrix: Tensor, name: str) -> int:
    """The sign of the determinant."""
    values = torch.linalg.svdvals(matrix.to(torch.float64))
    if values[-1] <= len(matrix) * torch.finfo(torch.float64).eps * values[0]:
        raise ValueError(
            f"`{name}` must be invertible, got a least singular value of {values[-1].item():.3g} beside "
            f"{values[0].item():.3g}. A diffeomorphism forgets nothing; take a matrix of full rank."
        )
    return int(torch.linalg.slogdet(matrix.to(torch.float64)).sign.item())


def _is_positive_monomial(matrix: Tensor) -> bool:
    full = matrix != 0
    return bool((matrix >= 0).all() and (full.sum(0) == 1).all() and (full.sum(1) == 1).all())
