"""
Spacetime diffeomorphisms of a neural ODE, and what they leave alone.

    t [], tau(t) []           time before and after
    x, phi(t, x) [..., d]     points before and after; a field may mix the axes before the last, phi does not
    f(t, x) [..., d]          field of the ODE dx/dt = f(t, x)

If x(t) solves the ODE of f, then x'(tau(t)) = phi(t, x(t)) solves that of

    f'(tau, phi) = (∂_t phi + D_x phi f) / (d tau / dt),

by the chain rule. So the flows F of f from t0 to t1, and F' of f' from tau(t0) to tau(t1), are related by
`F' = phi(t1, .) ∘ F ∘ phi(t0, .)^-1`. Where the map is the identity at both ends, F' = F: the map is a gauge
transformation of the input-output map (Hashimoto, Hirono, Sannai, arXiv 2402.02362). For the chain rule phi must be C1
with an inverse that is C1, tau C1 with a positive derivative; for the flow, f Lipschitz in x.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ..extras import needs


Field = Callable[[Tensor, Tensor], Tensor]
"""`(t [], x [..., d]) -> dx/dt [..., d]`."""
TimeMap = Callable[[Tensor], Tensor]
SpaceMap = Callable[[Tensor, Tensor], Tensor]

# Solvers of torchdiffeq that choose their steps.
ADAPTIVE = {"adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2"}
NEWTON_STEPS, HALVINGS, DOUBLINGS = 60, 40, 60


def same_time(t: Tensor) -> Tensor:
    """The identity of time."""
    return t


def same_space(t: Tensor, x: Tensor) -> Tensor:
    """The identity of space."""
    return x


def rate(time: TimeMap, t: Tensor) -> Tensor:
    """
    `d tau / dt` `[]`.

    Raises:
        ValueError: if it is not positive.
    """
    value = jvp(time, (t,), (torch.ones_like(t),))[1]
    if not value.detach() > 0:
        raise ValueError(
            f"`time` must be increasing, got a derivative of {float(value.detach()):.3g} at t = "
            f"{float(t.detach()):.6g}. Take a `time` with a positive derivative."
        )
    return value


@dataclass(frozen=True)
class SpacetimeMap:
    """
    The diffeomorphism `(t, x) -> (tau(t), phi(t, x))`; such maps are a group, with `@` and [`inverse`].

    Inverses that are not given are found numerically: time by bracketing (Brent), space by Newton's method with
    halved steps, started at the image. Their first derivatives are exact (implicit function theorem), higher ones are
    not. Newton costs `d` Jacobian-vector products a step, so give the inverse where it is known.

    Args:
        time: `tau`, increasing, of a tensor `[]`.
        space: `phi(t, x)`; a diffeomorphism of R^d for every `t`, applied along the last axis of `[..., d]`.
        time_inverse: `tau^-1`.
        space_inverse: `(t, y) -> x` with `phi(t, x) = y`; `t` is the time before the map.
        tangent: `(t, x, v) -> ∂_t phi + D_x phi v`, where a closed form is faster than `torch.func.jvp`.
    """

    time: TimeMap = same_time
    space: SpaceMap = same_space
    time_inverse: TimeMap | None = None
    space_inverse: SpaceMap | None = None
    tangent: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(tau(t), phi(t, x))`."""
        return self.time(t), self.space(t, x)

    def invert_time(self, time: Tensor) -> Tensor:
        """
        `tau^-1(time)`.

        Raises:
            ValueError: if `time` is not in the range of `tau`, or `tau` is not increasing there.
        """
        if self.time is same_time:
            return time
        return self.time_inverse(time) if self.time_inverse else _invert_time(self.time, time)

    def invert_space(self, t: Tensor, y: Tensor) -> Tensor:
        """
        The `x` `[..., d]` with `phi(t, x) = y`; `t` is the time before the map.

        Raises:
            ValueError: if Newton's method does not find it.
        """
        if self.space is same_space:
            return y
        return self.space_inverse(t, y) if self.space_inverse else _invert_space(self.space, t, y)

    def push(self, t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        """The velocity `∂_t phi + D_x phi v` `[..., d]` of the image of `x + v dt`, per unit of the time before."""
        if self.space is same_space:
            return velocity
        if self.tangent:
            return self.tangent(t, x, velocity)
        return jvp(self.space, (t, x), (torch.ones_like(t), velocity))[1]

    def preimage(self, time: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The `(t, x)` that is mapped to `(time, y)`."""
        t = self.invert_time(time)
        return t, self.invert_space(t, y)

    def inverse(self) -> "SpacetimeMap":
        """`(time, y) -> (t, x)`."""
        return SpacetimeMap(
            time=same_time if self.time is same_time else self.invert_time,
            space=lambda time, y: self.invert_space(self.invert_time(time), y),
            time_inverse=self.time,
            space_inverse=lambda time, x: self.space(self.invert_time(time), x),
        )

    def __matmul__(self, first: "SpacetimeMap") -> "SpacetimeMap":
        """First `first`, then this one."""
        trivial = self.time is same_time and first.time is same_time
        return SpacetimeMap(
            time=same_time if trivial else lambda t: self.time(first.time(t)),
            space=lambda t, x: self.space(first.time(t), first.space(t, x)),
            time_inverse=lambda time: first.invert_time(self.invert_time(time)),
            space_inverse=lambda t, y: first.invert_space(t, self.invert_space(first.time(t), y)),
        )


def transform_field(field: Field, map: SpacetimeMap) -> Field:
    """
    The field `f'` whose solutions are the images of those of `field`, see the head of this file.

    One Jacobian-vector product of `(t, x) -> phi` along `(1, f)`; no Jacobian is formed where inverses are given.

    Raises:
        ValueError: when it is evaluated where `map` has no inverse, or its time does not increase.
    """

    def transformed(time: Tensor, y: Tensor) -> Tensor:
        t, x = map.preimage(time, y)
        velocity = map.push(t, x, field(t, x))
        return velocity if map.time is same_time else velocity / rate(map.time, t)

    return transformed


def trajectory(
    field: Field,
    x0: Tensor,
    times: Sequence[float] | Tensor,
    *,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    method: str = "dopri5",
    jumps: Sequence[float] = (),
    options: dict[str, Any] | None = None,
) -> Tensor:
    """
    The solution `[times, ..., d]` of `dx/dt = field(t, x)` from `x0` `[..., d]` at `times[0]`, by torchdiffeq.

    Args:
        field: Right-hand side.
        x0: Initial value.
        times: Increasing or decreasing.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        method: A solver of torchdiffeq; those with fixed steps take `options={"step_size": ...}`.
        jumps: Times at which `field` jumps; the solver stops there and sees one side at a time.
        options: Passed to the solver.

    Raises:
        ImportError: without torchdiffeq.
    """
    from torchdiffeq import odeint

    ends = torch.as_tensor(times, dtype=x0.dtype, device=x0.device)
    states = [x0]
    for start, end in itertools.pairwise(ends.tolist()):
        inside = sorted(jump for jump in jumps if min(start, end) < jump < max(start, end))
        stops = [start, *(inside if start < end else reversed(inside)), end]
        state = states[-1]
        for piece in itertools.pairwise(stops):
            chosen = dict(options or {})
            if method in ADAPTIVE:
                # Else it steps beyond the end and interpolates to order 4, which costs dopri8 half of its digits.
                chosen["step_t"] = ends.new_tensor([piece[1]])
            inner = _one_sided(field, *piece) if jumps else field
            settings: dict[str, Any] = {"rtol": rtol, "atol": atol, "method": method, "options": chosen}
            state = odeint(inner, state, ends.new_tensor(piece), **settings)[-1]
        states.append(state)
    return torch.stack(states)


def flow(field: Field, x0: Tensor, t0: float, t1: float, **solver: Any) -> Tensor:
    """The point that `x0` `[..., d]` at `t0` has reached at `t1`; `solver` as in [`trajectory`]."""
    return trajectory(field, x0, [t0, t1], **solver)[-1]


def flow_difference(field: Field, map: SpacetimeMap, x0: Tensor, t0: float, t1: float, **solver: Any) -> float:
    """
    max |F'(x) - F(x)| / max |F(x)| for the flows from `t0` to `t1` of `field` and of its image under `map`.

    Zero up to the solver's error if `map` is the identity at both ends ([`end_deviation`] is 0), and in general not
    otherwise. `solver` as in [`trajectory`].
    """
    before = flow(field, x0, t0, t1, **solver)
    return _relative(flow(transform_field(field, map), x0, t0, t1, **solver), before)


def flow_equivariance_error(field: Field, map: SpacetimeMap, x0: Tensor, t0: float, t1: float, **solver: Any) -> float:
    """
    max |F'(phi_0(x)) - phi_1(F(x))| / max |phi_1(F(x))|, with F' from `tau(t0)` to `tau(t1)`.

    Zero up to the solver's error for every `map`: `F' = phi_1 ∘ F ∘ phi_0^-1`. `solver` as in [`trajectory`].
    """
    start, start_image = map(x0.new_tensor(t0), x0)
    end, end_image = map(x0.new_tensor(t1), flow(field, x0, t0, t1, **solver))
    turned = flow(transform_field(field, map), start_image, start.item(), end.item(), **solver)
    return _relative(turned, end_image)


def end_deviation(map: SpacetimeMap, x: Tensor, t0: float, t1: float) -> float:
    """The largest `|tau(t) - t|` and `|phi(t, x) - x|` at the ends `t0` and `t1`, over the points `x` `[..., d]`."""
    worst = 0.0
    for t in (x.new_tensor(end) for end in (t0, t1)):
        time, image = map(t, x)
        worst = max(worst, (time - t).abs().item(), (image - x).abs().max().item())
    return worst


def _one_sided(field: Field, start: float, end: float) -> Field:
    """`field` with its one-sided limits at the ends."""
    low, high = sorted((start, end))

    def limited(t: Tensor, x: Tensor) -> Tensor:
        first, last = (torch.nextafter(t.new_tensor(a), t.new_tensor(b)) for a, b in ((low, high), (high, low)))
        return field(torch.minimum(torch.maximum(t, first), last), x)

    return limited


def _relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def _invert_time(time: TimeMap, target: Tensor) -> Tensor:
    value = float(target.detach())

    def excess(t: float) -> float:
        return float(time(target.detach().new_tensor(t)).detach()) - value

    def bound(side: int) -> float:
        """The first of points ever further to the `side` of the target that is not short of it."""
        t, width = value, 1.0
        for _ in range(DOUBLINGS):
            if not side * excess(t) < 0:
                break
            t, width = t + side * width, 2 * width
        return t

    low, high = bound(-1), bound(1)
    if excess(low) > 0 or excess(high) < 0:
        raise ValueError(
            f"`time` must be increasing and reach {value:.6g}, got {excess(low) + value:.6g} at {low:.3g} and "
            f"{excess(high) + value:.6g} at {high:.3g}. Integrate inside its range, or pass `time_inverse`."
        )
    with needs("flow"):
        from scipy.optimize import brentq

    root = low if low == high else brentq(excess, low, high, xtol=1e-14, rtol=1e-14)
    t = target.detach().new_tensor(root)
    # One step of Newton that is differentiated gives the derivative of the inverse.
    return t - (time(t) - target) / rate(time, t)


def _jacobian(space: SpaceMap, t: Tensor, x: Tensor) -> Tensor:
    """`D_x phi` `[..., d, d]`: one Jacobian-vector product for each column, all at once."""
    columns = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape, x.shape[-1]).movedim(-2, 0)
    return vmap(lambda column: jvp(lambda p: space(t, p), (x,), (column,))[1], out_dims=-1)(columns)


def _newton_step(jacobian: Tensor, residual: Tensor) -> Tensor:
    step, info = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))
    if info.any():
        raise ValueError(
            "`space` must be a diffeomorphism, got a singular Jacobian in the search for its inverse. Pass "
            "`space_inverse`, or a map that moves points less."
        )
    return step.squeeze(-1)


def _invert_space(space: SpaceMap, time: Tensor, image: Tensor) -> Tensor:
    t, y = time.detach(), image.detach()
    x, residual = y, space(t, y) - y
    size = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
    # Rounding of phi is relative to its size, so a smaller residual means nothing.
    rounding = torch.finfo(y.dtype).eps * (1 + torch.linalg.vector_norm(y, dim=-1, keepdim=True))
    for _ in range(NEWTON_STEPS):
        if (size <= 2 * rounding).all():
            break
        step = _newton_step(_jacobian(space, t, x), residual)
        part, improved = torch.ones_like(size), torch.zeros_like(size, dtype=torch.bool)
        for _ in range(HALVINGS):
            tried = x - part * step
            new_residual = space(t, tried) - y
            new_size = torch.linalg.vector_norm(new_residual, dim=-1, keepdim=True)
            better = (new_size < size) & ~improved
            x, residual = torch.where(better, tried, x), torch.where(better, new_residual, residual)
            size, improved = torch.where(better, new_size, size), improved | better
            if (improved | (size <= 100 * rounding)).all():
                break
            part = part / 2
        if not improved.any():
            break
    if not (size <= 1000 * rounding).all():
        raise ValueError(
            f"`space` must be a diffeomorphism, got no point whose image is nearer than {size.max().item():.3g} at "
            f"t = {float(t):.6g}. Pass `space_inverse`, or a map that moves points less."
        )
    # One step of Newton that is differentiated gives the derivative of the inverse.
    return x - _newton_step(_jacobian(space, t, x), space(time, x) - image)
