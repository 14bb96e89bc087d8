"""Spacetime diffeomorphisms: the flow stays if they are the identity at both ends, and turns along if not."""

import math

import pytest
import torch
from torch import Tensor

from rigpt_hf.flow.diffeomorphism import (
    SpacetimeMap,
    end_deviation,
    flow,
    flow_difference,
    flow_equivariance_error,
    trajectory,
    transform_field,
)
from rigpt_hf.flow.linear_field import linear_field, linear_map
from rigpt_hf.pictures import diffeomorphism as pictures
from rigpt_hf.symmetry import so_exp
from tests.tolerances import SYMMETRY


# What the solver below leaves, and more.
FLOW = 1e-8
FINE = {"method": "dopri8", "rtol": 1e-9, "atol": 1e-11}
# For controls, which differ by far more.
ROUGH = {"rtol": 1e-4, "atol": 1e-6}
EXACT = SYMMETRY[torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hump(t: Tensor) -> Tensor:
    """0 at 0 and 1."""
    return 4 * t * (1 - t)


def clock(t: Tensor) -> Tensor:
    """Increasing, with 0 and 1 where they were."""
    return t + 0.3 * t * (1 - t)


def clock_inverse(t: Tensor) -> Tensor:
    return (1.3 - torch.sqrt(1.69 - 1.2 * t)) / 0.6


def shear(strength, time=clock, time_inverse=clock_inverse) -> SpacetimeMap:
    """Nonlinear in space, with an inverse that is known; `strength(t)` 0 is the identity."""

    def space(t: Tensor, x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        b = b + strength(t) * torch.sin(2 * a)
        return torch.stack([a + strength(t) * torch.cos(b) - strength(t), b], -1)

    def inverse(t: Tensor, y: Tensor) -> Tensor:
        a, b = y.unbind(-1)
        a = a - strength(t) * torch.cos(b) + strength(t)
        return torch.stack([a, b - strength(t) * torch.sin(2 * a)], -1)

    return SpacetimeMap(time, space, time_inverse, inverse)


def frame(strength, time=clock, time_inverse=clock_inverse) -> SpacetimeMap:
    """Linear in space."""
    generator = torch.tensor([[0.5, -2.0], [2.0, -0.3]], dtype=torch.float64)
    return linear_map(lambda t: torch.linalg.matrix_exp(strength(t) * generator), time, time_inverse)


MAPS = {"linear": frame, "nonlinear": shear}


def linear(t: Tensor, x: Tensor) -> Tensor:
    turning = torch.tensor([[-0.4, 1.5], [-1.0, 0.2]], dtype=torch.float64)
    return linear_field(lambda s: turning + s * turning.T)(t, x)


class Perceptron(torch.nn.Module):
    """A vector field of two layers that reads the time."""

    def __init__(self, size: int = 2):
        super().__init__()
        self.up = torch.nn.Parameter(normal(8, size + 1, seed=1))
        self.down = torch.nn.Parameter(normal(size, 8, seed=2) / 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1) @ self.up.T) @ self.down.T


FIELDS = {"linear": linear, "nonlinear": Perceptron().requires_grad_(False)}


@pytest.mark.parametrize(
    ("field", "space"), [("nonlinear", "linear"), pytest.param("linear", "nonlinear", marks=pytest.mark.full)]
)
@pytest.mark.full
def test_identity_at_both_ends_changes_nothing(field, space):
    f, map, x = FIELDS[field], MAPS[space](hump), normal(3, 2)
    assert end_deviation(map, x, 0, 1) <= EXACT
    difference = flow_difference(f, map, x, 0, 1, **FINE)
    print(f"identity at both ends, {field} f, {space} φ: {difference:.1e}")
    assert difference <= FLOW
    # In between it is another field with another flow, so that the test says something.
    half = torch.tensor(0.5, dtype=torch.float64)
    assert (transform_field(f, map)(half, x) - f(half, x)).abs().max() > 0.3
    assert flow_difference(f, map, x, 0, 0.5, **ROUGH) > 0.1


@pytest.mark.full
def test_dopri5_agrees():
    difference = flow_difference(FIELDS["nonlinear"], shear(hump), normal(3, 2), 0, 1, method="dopri5")
    print(f"the same by dopri5: {difference:.1e}")
    assert difference <= FLOW


@pytest.mark.parametrize(
    ("space", "strength"), [("linear", lambda t: t), ("nonlinear", lambda t: 1 - t)], ids=["end", "start"]
)
@pytest.mark.by_default(1)
def test_not_the_identity_at_one_end_is_equivariant_and_not_invariant(space, strength):
    f, map, x = FIELDS["nonlinear"], MAPS[space](strength), normal(3, 2)
    assert end_deviation(map, x, 0, 1) > 0.5
    apart = flow_difference(f, map, x, 0, 1, **ROUGH)
    error = flow_equivariance_error(f, map, x, 0, 1, **FINE)
    print(f"not the identity at one end, {space} φ: {apart:.1f}, F' against φ_1 F φ_0⁻¹: {error:.1e}")
    assert apart > 0.1
    assert error <= FLOW


def test_time_that_ends_elsewhere():
    f, x = FIELDS["nonlinear"], normal(3, 2)
    slower = SpacetimeMap(time=lambda t: 1.5 * t + 0.2)
    assert flow_difference(f, slower, x, 0, 1, **ROUGH) > 0.01
    assert flow_equivariance_error(f, slower, x, 0, 1, **FINE) <= FLOW
    assert flow_difference(f, SpacetimeMap(time=clock), x, 0, 1, **FINE) <= FLOW


def test_every_term_of_the_transformation_is_needed():
    f, map, x = FIELDS["nonlinear"], shear(hump), normal(3, 2)
    before = flow(f, x, 0, 1, **FINE)

    def without(term: str):
        def field(time: Tensor, y: Tensor) -> Tensor:
            t, x = map.preimage(time, y)
            tangents = (torch.zeros_like(t) if term == "∂_t phi" else torch.ones_like(t), f(t, x))
            velocity = torch.func.jvp(map.space, (t, x), tangents)[1] if term != "D_x phi" else f(t, x)
            return velocity if term == "tau'" else velocity / (1.3 - 0.6 * t)

        return field

    assert (flow(without(""), x, 0, 1, **FINE) - before).abs().max() <= FLOW
    for term in ("∂_t phi", "D_x phi", "tau'"):
        assert (flow(without(term), x, 0, 1, **ROUGH) - before).abs().max() > 0.01, term


def test_maps_are_a_group_that_acts_on_fields():
    f, x, t = FIELDS["nonlinear"], normal(2, 3, 2), torch.tensor(0.3, dtype=torch.float64)
    a, b, c = shear(hump), frame(lambda t: t), shear(lambda t: 0.3 + t, time=lambda t: 2 * t, time_inverse=None)
    for one, other in ((c @ (b @ a), (c @ b) @ a), ((b @ a).inverse(), a.inverse() @ b.inverse())):
        for mine, its in zip(one(t, x), other(t, x), strict=True):
            assert (mine - its).abs().max() <= EXACT
    for one in (a.inverse() @ a, a @ a.inverse(), c @ c.inverse()):
        time, image = one(t, x)
        assert (time - t).abs() <= EXACT and (image - x).abs().max() <= EXACT
    # A left action, in this order and no other.
    together = transform_field(f, b @ a)(t, x)
    assert (transform_field(transform_field(f, a), b)(t, x) - together).abs().max() <= EXACT
    assert (transform_field(transform_field(f, b), a)(t, x) - together).abs().max() > 0.1
    assert (transform_field(transform_field(f, c), c.inverse())(t, x) - f(t, x)).abs().max() <= EXACT
    assert torch.equal(transform_field(f, SpacetimeMap())(t, x), f(t, x))


@pytest.mark.parametrize("shape", [(), (4,), (2, 0), (2, 3)], ids=str)
def test_numerical_inverses_agree_with_given_ones(shape):
    f, t = FIELDS["nonlinear"], torch.tensor(0.4, dtype=torch.float64)
    given, y = shear(lambda t: 0.8 * t), normal(*shape, 2)
    numerical = SpacetimeMap(given.time, given.space)
    tangents = (torch.ones_like(t), torch.ones_like(y))
    for name in ("preimage", "inverse"):
        functions = [getattr(map, name) if name == "preimage" else map.inverse() for map in (given, numerical)]
        # Values, and derivatives along time and space together.
        (values, slopes), (mine, my_slopes) = (torch.func.jvp(function, (t, y), tangents) for function in functions)
        for mine_, given_ in zip((*mine, *my_slopes), (*values, *slopes), strict=True):
            assert torch.allclose(mine_, given_, rtol=EXACT, atol=EXACT)
    assert slopes[0] > 0.5, "the tangents got lost in both"
    image = transform_field(f, numerical)(t, y)
    assert image.shape == y.shape
    assert torch.allclose(image, transform_field(f, given)(t, y), rtol=EXACT, atol=EXACT)


@pytest.mark.full
def test_flow_with_numerical_inverses():
    turn = normal(2, 2, seed=3) / 4
    map = SpacetimeMap(clock, lambda t, x: x + hump(t) * torch.sin(x @ turn.T))
    assert end_deviation(map, normal(3, 2), 0, 1) <= EXACT
    assert flow_difference(linear, map, normal(3, 2), 0, 1, **FINE) <= FLOW


def attention(t: Tensor, x: Tensor) -> Tensor:
    """The field of a small RiGPT on `[..., tokens, d]`: norm, causal attention, an MLP, scores that change with t."""
    size = x.shape[-1]
    q, k, v, o, up = (normal(size, size, seed=10 + index) / 2 for index in range(5))
    n = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    scores = (n @ q.T) @ (n @ k.T).mT * torch.cos(t) / math.sqrt(size)
    hidden = torch.ones(x.shape[-2], x.shape[-2]).triu(1).bool()
    mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ (n @ v.T) @ o.T
    return mixed + torch.relu(n @ up.T).square() @ up / 4


def test_tokens_are_more_points_of_one_space():
    x = normal(2, 3, 2)
    difference = flow_difference(attention, shear(hump), x, 0, 1, **FINE)
    print(f"attention on three tokens: {difference:.1e}")
    assert difference <= FLOW
    assert flow_difference(attention, shear(lambda t: t), x, 0, 1, **ROUGH) > 0.1
    # The frame of a token depends on no other token; the field does mix them.
    moved = x.clone()
    moved[:, 0] += 1
    t = torch.tensor(0.5, dtype=torch.float64)
    assert (transform_field(attention, shear(hump))(t, moved) - attention(t, x))[:, 1:].abs().max() > 0.01


def test_tokens_are_more_coordinates_when_the_map_mixes_them():
    x = normal(2, 3, 2)
    skew = normal(6, 6, seed=4)
    mixing = linear_map(lambda t: so_exp(hump(t) * (skew - skew.T) / 4), clock, clock_inverse)

    def flat(t: Tensor, x: Tensor) -> Tensor:
        return attention(t, x.unflatten(-1, (3, 2))).flatten(-2)

    assert flow_difference(flat, mixing, x.flatten(-2), 0, 1, **FINE) <= FLOW


@pytest.mark.full
def test_gradients_of_the_function_stay():
    f, x = Perceptron(), normal(3, 2)
    gradients = [
        torch.autograd.grad(flow(field, x, 0, 1, **solver).square().sum(), list(f.parameters()))
        for field, solver in (
            (f, FINE),
            (transform_field(f, shear(hump)), FINE),
            (transform_field(f, shear(lambda t: t)), ROUGH),
        )
    ]
    for before, after, other in zip(*gradients, strict=True):
        assert (after - before).abs().max() <= FLOW * before.abs().max()
        assert (other - before).abs().max() > 0.01 * before.abs().max()


def test_trajectory_ends_where_it_should_with_every_solver():
    matrix = normal(3, 3)
    x, field = normal(4, 3, seed=1), linear_field(lambda t: matrix)
    for method in ("dopri5", "dopri8"):
        states = trajectory(field, x, [0.0, 0.3, 1.0], method=method)
        for state, t in zip(states, (0.0, 0.3, 1.0), strict=True):
            assert (state - x @ torch.linalg.matrix_exp(t * matrix).T).abs().max() <= FLOW
        assert (flow(field, states[-1], 1, 0, method=method) - x).abs().max() <= FLOW
    assert torch.allclose(flow(field, x, 0, 1, method="euler"), x + x @ matrix.T)


@pytest.mark.parametrize("method", ["dopri8", "rk4"])
def test_jumps_are_seen_from_one_side(method):
    def step(t: Tensor, x: Tensor) -> Tensor:
        return torch.ones_like(x) * (1 if t < 1 else -3)

    x = normal(2)
    states = trajectory(step, x, [0, 1, 2], jumps=[0, 1, 2], method=method)
    assert (states - x - torch.tensor([0, 1, -2])[:, None]).abs().max() <= EXACT
    assert (flow(step, x, 2, 0, jumps=[1], method=method) - x - 2).abs().max() <= EXACT
    if method == "rk4":
        wrong = trajectory(step, x, [0, 1, 2], method=method)
        assert (wrong - x - torch.tensor([0, 1, -2])[:, None]).abs().max() > 0.1


def test_maps_that_are_no_diffeomorphisms_raise():
    f, x, t = FIELDS["linear"], normal(3, 2), torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="`time` must be increasing and reach 0.5.*pass `time_inverse`"):
        transform_field(f, SpacetimeMap(time=lambda t: -t))(t, x)
    with pytest.raises(ValueError, match="`time` must be increasing and reach 0.5"):
        transform_field(f, SpacetimeMap(time=lambda t: torch.atan(t) / math.pi - 0.5))(t, x)
    backwards = SpacetimeMap(time=lambda t: 1 - t, time_inverse=lambda t: 1 - t)
    with pytest.raises(ValueError, match="`time` must be increasing, got a derivative of -1 at t = 0.5"):
        transform_field(f, backwards)(t, x)
    with pytest.raises(ValueError, match="`space` must be a diffeomorphism, got a singular Jacobian"):
        transform_field(f, SpacetimeMap(space=lambda t, x: 0 * x))(t, x)
    with pytest.raises(ValueError, match="`space` must be a diffeomorphism, got no point whose image is nearer"):
        transform_field(f, SpacetimeMap(space=lambda t, x: x.square() + 1))(t, x)


@pytest.mark.full
def test_figure(monkeypatch):
    monkeypatch.setattr(pictures, "TOLERANCES", [1e-3, 1e-5])
    monkeypatch.setattr(pictures, "SOLVER", {"rtol": 1e-5, "atol": 1e-7})
    monkeypatch.setattr(pictures, "FRAMES", 5)
    figure = pictures.plot_diffeomorphism()
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert len(panels) == 3 and all(panel.get_xlabel() and panel.get_ylabel() for panel in panels)
    fixed, free = (line.get_ydata() for line in panels[2].get_lines())
    assert fixed[1] < fixed[0] / 10 and fixed[1] < 1e-4 and min(free) > 0.1
    # Both start and end at the same points, and go other ways.
    ways = [[line.get_segments() for line in panel.collections] for panel in panels[:2]]
    assert len(ways[0]) == len(ways[1]) == 17
    for one, other in zip(*ways, strict=True):
        assert abs(one[0][0] - other[0][0]).max() == 0 and abs(one[-1][1] - other[-1][1]).max() < 1e-4
    assert max(abs(one[2][0] - other[2][0]).max() for one, other in zip(*ways, strict=True)) > 0.5
