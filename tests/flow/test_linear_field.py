"""Linear neural ODEs: the closed form of a transformed generator."""

import pytest
import torch
from torch import Tensor

from rigpt_hf.flow.diffeomorphism import SpacetimeMap, flow, transform_field
from rigpt_hf.flow.linear_field import linear_field, linear_map, propagator, transform_generator
from tests.flow.test_diffeomorphism import EXACT, FINE, FLOW, clock, clock_inverse, hump, normal


SIZE = 3


def generator(t: Tensor) -> Tensor:
    return normal(SIZE, SIZE, seed=1) + torch.sin(3 * t) * normal(SIZE, SIZE, seed=2)


def frame(strength):
    return lambda t: torch.linalg.matrix_exp(strength(t) * normal(SIZE, SIZE, seed=3))


@pytest.mark.parametrize("time", [None, clock], ids=["space", "spacetime"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 4)], ids=str)
def test_closed_form_is_the_transformation_of_the_field(time, shape):
    clocks = (time, clock_inverse) if time else ()
    matrix, x = frame(lambda t: 1 - t), normal(*shape, SIZE)
    general = transform_field(linear_field(generator), linear_map(matrix, *clocks))
    closed = linear_field(transform_generator(generator, matrix, *clocks))
    for t in torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64):
        assert (general(t, x) - closed(t, x)).abs().max() <= EXACT * general(t, x).abs().max()
        homogeneous = x @ (matrix(t) @ generator(t) @ torch.linalg.inv(matrix(t))).T
        assert (general(t, x) - homogeneous).abs().max() > 0.1, "without ∂_t Q it would not be told apart"


def test_propagator_turns_at_its_ends():
    before = propagator(generator, SIZE, 0, 1, **FINE)
    fixed, free = (transform_generator(generator, frame(s)) for s in (hump, lambda t: t + 0.5))
    assert (propagator(fixed, SIZE, 0, 1, **FINE) - before).abs().max() <= FLOW * before.abs().max()
    after = propagator(free, SIZE, 0, 1, **FINE)
    q0, q1 = (frame(lambda t: t + 0.5)(torch.tensor(t, dtype=torch.float64)) for t in (0.0, 1.0))
    assert (after - q1 @ before @ torch.linalg.inv(q0)).abs().max() <= FLOW * after.abs().max()
    assert (after - before).abs().max() > 0.1 * before.abs().max()


def test_other_clock():
    before = propagator(generator, SIZE, 0, 1, **FINE)
    after = transform_generator(generator, time=clock)
    t = torch.tensor(0.3, dtype=torch.float64)
    general = transform_field(linear_field(generator), SpacetimeMap(time=clock))
    x = normal(4, SIZE)
    assert (linear_field(after)(t, x) - general(t, x)).abs().max() <= EXACT
    assert (after(t) - generator(t)).abs().max() > 0.1
    given = transform_generator(generator, time=clock, time_inverse=clock_inverse)
    assert (propagator(given, SIZE, 0, 1, **FINE) - before).abs().max() <= FLOW * before.abs().max()
    # Speed left as it was, the clock alone changed: another function.
    wrong = propagator(lambda t: generator(clock_inverse(t)), SIZE, 0, 1, **FINE)
    assert (wrong - before).abs().max() > 0.01


def test_propagator_of_a_constant_generator_is_its_exponential():
    matrix = normal(SIZE, SIZE)
    found = propagator(lambda t: matrix, SIZE, 0, 2)
    exact = torch.linalg.matrix_exp(2 * matrix)
    assert (found - exact).abs().max() <= FLOW * exact.abs().max()
    assert (found - exact.T).abs().max() > 0.1
    x = normal(4, SIZE)
    assert (flow(linear_field(lambda t: matrix), x, 0, 2) - x @ exact.T).abs().max() <= FLOW * exact.abs().max()


def test_from_nothing_every_frame_makes_its_connection():
    matrix, t = frame(lambda t: t), torch.tensor(0.7, dtype=torch.float64)
    made = transform_generator(lambda t: torch.zeros(SIZE, SIZE, dtype=torch.float64), matrix)
    assert (made(t) - normal(SIZE, SIZE, seed=3)).abs().max() <= EXACT


def test_time_that_goes_back_raises():
    with pytest.raises(ValueError, match="`time` must be increasing, got a derivative of -1"):
        transform_generator(generator, time=lambda t: 1 - t, time_inverse=lambda t: 1 - t)(torch.tensor(0.5).double())
