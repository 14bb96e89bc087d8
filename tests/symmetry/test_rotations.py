"""Orthogonal matrices: uniform sampling, exponentials and logarithms of either determinant, rotary form."""

import math

import pytest
import torch

from rigpt_hf.rope_rigpt import cos_sin, rotate
from rigpt_hf.symmetry import haar, o_log, rotary_form, so_exp, so_log
from tests.symmetry.options import generator
from tests.tolerances import CONVERSION, SYMMETRY


EXACT = CONVERSION[torch.float64]


def test_haar_is_orthogonal_with_both_determinants_and_repeats_with_its_generator():
    for n in (1, 2, 3, 8, 33):
        draws = [haar(n, generator(seed)) for seed in range(20)]
        for q in draws:
            assert (q @ q.T - torch.eye(n, dtype=torch.float64)).abs().max() <= EXACT
        assert {round(torch.linalg.det(q).item()) for q in draws} == {-1, 1}
        assert all(torch.linalg.det(haar(n, generator(seed), special=True)) > 0 for seed in range(20))
    assert torch.equal(haar(5, generator(1)), haar(5, generator(1)))
    assert torch.equal(haar(5, generator(1), dtype=torch.float32), haar(5, generator(1)).to(torch.float32))
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        haar(0)


def test_haar_is_uniform():
    # For Haar matrices the trace has mean 0 and variance 1; without the sign fix of QR its mean is far from 0.
    traces = torch.stack([haar(6, generator(seed)).trace() for seed in range(2000)])
    assert abs(traces.mean()) < 4 / math.sqrt(2000)
    assert abs(traces.var() - 1) < 0.2
    biased = [torch.linalg.qr(torch.randn(6, 6, generator=generator(s), dtype=torch.float64))[0] for s in range(2000)]
    assert abs(torch.stack([q.trace() for q in biased]).mean()) > 4 / math.sqrt(2000), "the test cannot tell"


@pytest.mark.parametrize("n", [2, 3, 8, 33])
def test_exp_and_log_are_inverse(n):
    for largest_angle in (1e-8, 0.1, 2.0, math.pi - 1e-3):
        skew = torch.randn(n, n, generator=generator(n), dtype=torch.float64)
        skew = skew - skew.T
        skew *= largest_angle / torch.linalg.matrix_norm(skew, ord=2)
        assert (so_log(so_exp(skew)) - skew).abs().max() <= EXACT, largest_angle
    for seed in range(5):
        rotation = haar(n, generator(seed), special=True)
        assert (so_exp(so_log(rotation)) - rotation).abs().max() <= SYMMETRY[torch.float64]


def test_half_turns_have_a_logarithm_and_reflections_have_none():
    half_turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    assert (so_exp(so_log(half_turn)) - half_turn).abs().max() <= EXACT
    with pytest.raises(ValueError, match="determinant \\+1"):
        so_log(torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_coordinates_of_either_determinant(n):
    signs = set()
    for seed in range(10):
        matrix = haar(n, generator(seed))
        skew, sign = o_log(matrix)
        reflection = torch.eye(n, dtype=torch.float64)
        reflection[0, 0] = sign
        assert (so_exp(skew) @ reflection - matrix).abs().max() <= SYMMETRY[torch.float64]
        assert (skew + skew.T).abs().max() <= EXACT
        assert torch.linalg.matrix_norm(skew, ord=2) <= math.pi + EXACT, "not the shortest"
        assert sign == round(torch.linalg.det(matrix).item())
        if sign > 0:
            assert torch.equal(skew, so_log(matrix))
        signs.add(sign)
    assert signs == {-1, 1}


def test_equal_angles_do_not_spoil_the_logarithm():
    # Every vector turns by the same angle (a quaternion from the left): the planes are not determined, the log is.
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    basis = haar(6, generator(6))
    for angle in (1e-9, 0.7, math.pi - 1e-3):
        skew = basis @ torch.block_diag(*[angle * turn] * 3) @ basis.T
        assert (so_log(so_exp(skew)) - skew).abs().max() <= EXACT


@pytest.mark.parametrize("degenerate", [False, True], ids=["generic", "with-a-plane-at-rest"])
def test_every_rotation_group_of_the_head_is_rotary_in_some_basis(degenerate):
    skew = torch.randn(8, 8, generator=generator(3), dtype=torch.float64)
    skew = skew - skew.T
    if degenerate:
        projector = haar(8, generator(4))[:, :6]
        skew = projector @ projector.T @ skew @ projector @ projector.T
    frequencies, basis = rotary_form(skew)
    assert (basis @ basis.T - torch.eye(8, dtype=torch.float64)).abs().max() <= EXACT
    query = torch.randn(1, 1, 5, 8, generator=generator(5), dtype=torch.float64)
    positions = torch.arange(5, dtype=torch.float64)
    cos, sin = cos_sin(positions[:, None] * frequencies, 1.0, torch.float64)
    by_rotary = rotate(query @ basis, cos, sin) @ basis.T
    by_exponential = torch.stack([so_exp(p * skew) @ q for p, q in zip(positions, query[0, 0], strict=True)])
    assert (by_rotary[0, 0] - by_exponential).abs().max() <= SYMMETRY[torch.float64]
    assert (by_rotary[0, 0, 1:] - query[0, 0, 1:]).abs().max() > 0.1, "nothing turned"
    wrong = rotate(query, cos, sin)
    assert (wrong[0, 0] - by_exponential).abs().max() > 0.1, "the basis does not matter"


def test_rotary_form_refuses_what_generates_no_rotations():
    with pytest.raises(ValueError, match="`skew` must be skew-symmetric"):
        rotary_form(torch.eye(4, dtype=torch.float64))
