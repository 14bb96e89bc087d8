"""Grids and GPTQ against plain formulas."""

import pytest
import torch

from rigpt_hf.quantization import Codes, gptq, hadamard, rounded_codes
from rigpt_hf.quantization.grid import best_scales, check_grid
from rigpt_hf.quantization.hadamard import known_hadamard

from ..tolerances import SYMMETRY


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs that have much in common."""
    inputs = gaussian(200, n, seed=seed) @ gaussian(n, n, seed=seed + 1)
    return inputs.T @ inputs / 200


def error(weight: torch.Tensor, codes: Codes, moments: torch.Tensor) -> float:
    lost = weight - codes.dense(torch.float64)
    return float((lost @ moments * lost).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("clip", [True, False])
def test_codes_are_whole_numbers_and_scales_of_half_precision(bits, group, clip):
    weight = gaussian(6, 24)
    codes = rounded_codes(weight, bits, group, clip=clip)
    assert codes.codes.dtype == torch.int8 and codes.codes.shape == weight.shape
    assert codes.codes.min() >= -(2 ** (bits - 1)) and codes.codes.max() <= 2 ** (bits - 1) - 1
    assert codes.scales.shape == (6, 3 if group else 1) and torch.equal(codes.scales, codes.scales.half().float())
    steps = codes.scales.double().abs().repeat_interleave(group or 24, dim=1)
    within = (codes.dense(torch.float64) - weight).abs() <= steps * 0.5001
    assert within.double().mean() > 0.7 and (clip or within.all())
    assert codes.stored_bits == 6 * 24 * bits + 16 * codes.scales.numel()


def test_the_best_scale_is_the_best_of_a_fine_search():
    values, importance = gaussian(5, 16), gaussian(16, seed=3).square()

    def cost(scales: torch.Tensor) -> torch.Tensor:
        rounded = (values / scales[:, None]).round().clamp(-8, 7) * scales[:, None]
        return ((values - rounded).square() * importance).sum(1)

    found = cost(best_scales(values, importance, 4))
    reach = values.abs().amax(1) / 7
    fine = torch.stack([cost(share * sign * reach) for share in torch.linspace(0.4, 1, 600) for sign in (-1, 1)]).amin(
        0
    )
    assert (found <= 1.1 * fine).all()
    # Weighing all alike is worse for these weights.
    assert found.sum() < cost(best_scales(values, torch.ones(16).double(), 4)).sum()


def test_gptq_is_the_plain_recursion():
    weight, moments = gaussian(4, 20), correlated(20)
    codes = gptq(weight, moments, 4)
    scales = codes.scales[:, 0].double()
    damped = moments / moments.diagonal().mean() + 0.01 * torch.eye(20)
    left, inverse = weight.clone(), torch.linalg.inv(damped)
    expected = torch.zeros(4, 20, dtype=torch.float64)
    for column in range(20):
        expected[:, column] = (left[:, column] / scales).round().clamp(-8, 7)
        lost = left[:, column] - expected[:, column] * scales
        # The inverse of what is left after this column (Frantar et al., equations 2 and 3).
        left -= torch.outer(lost / inverse[column, column], inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert torch.equal(codes.codes.double(), expected)
    assert (codes.codes != rounded_codes(weight, 4).codes).any()


@pytest.mark.parametrize("group", [None, 5, 20])
def test_gptq_loses_less_than_rounding(group):
    weight, moments = gaussian(8, 40), correlated(40)
    plain = rounded_codes(weight, 4, group, moments.diagonal())
    assert error(weight, gptq(weight, moments, 4, group), moments) < 0.7 * error(weight, plain, moments)


@pytest.mark.parametrize("group", [None, 8])
def test_gptq_with_moments_like_the_identity_is_rounding(group):
    weight, eye = gaussian(6, 256), torch.eye(256, dtype=torch.float64)
    found, plain = gptq(weight, 3 * eye, 4, group), rounded_codes(weight, 4, group)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scales, plain.scales)
    assert not torch.equal(gptq(weight, correlated(256), 4, group).codes, plain.codes)


def test_blocks_of_columns_are_no_more_than_an_order_of_sums():
    # Wider than a block, and with groups that do not divide one.
    weight, moments = gaussian(3, 300), correlated(300)
    for group in (None, 50, 100):
        codes = gptq(weight, moments, 4, group)
        assert error(weight, codes, moments) < error(weight, rounded_codes(weight, 4, group), moments)


def test_moments_in_blocks_are_moments_without_what_is_between_them():
    weight, blocks = gaussian(5, 24), torch.stack([correlated(12), correlated(12, seed=7)])
    # Each block is damped by its own mean.
    whole = torch.block_diag(*(block / block.diagonal().mean() for block in blocks))
    scaled = torch.stack([block / block.diagonal().mean() for block in blocks])
    assert torch.equal(gptq(weight, scaled, 4, 6).codes, gptq(weight, whole, 4, 6).codes)
    unseen = torch.stack([blocks[0], torch.zeros(12, 12, dtype=torch.float64)])
    assert gptq(weight, unseen, 4, 6).codes.abs().sum() > 0


def test_gains_are_taken_out_and_come_back():
    weight, moments = gaussian(5, 16), correlated(16)
    gain = torch.exp2(torch.arange(16) % 5 - 2).double()
    for make in (
        lambda weight, moments, gain: gptq(weight, moments, 4, gain=gain),
        lambda weight, moments, gain: rounded_codes(weight, 4, None, moments.diagonal(), gain=gain),
    ):
        with_gain = make(weight, moments, gain)
        without = make(weight / gain, moments * gain[:, None] * gain, None)
        assert torch.equal(with_gain.codes, without.codes)
        assert torch.equal(with_gain.dense(torch.float64), without.dense(torch.float64) * gain)
        assert not torch.equal(with_gain.codes, make(weight, moments, None).codes)


def test_rows_of_zeros_stay_so():
    weight = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)])
    for codes in (rounded_codes(weight, 4), gptq(weight, torch.eye(8), 4, 4), rounded_codes(weight, 4, clip=False)):
        assert not codes.dense()[0].any() and torch.allclose(codes.dense()[1], weight[1], rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 64, 576, 896, 960])
def test_hadamard_matrices(n):
    matrix = hadamard(n, torch.Generator().manual_seed(0))
    assert (matrix.abs() * n**0.5 - 1).abs().max() < SYMMETRY[torch.float64]
    assert (matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max() < SYMMETRY[torch.float64]
    assert n < 4 or not torch.equal(matrix, known_hadamard(n))


def test_unknown_sizes_are_refused():
    assert known_hadamard(6) is None
    with pytest.raises(ValueError, match="`frame` must be 'own' for a width of 6, for which no Hadamard matrix"):
        hadamard(6)


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="`bits` must be from 2 to 8, got 1"):
        rounded_codes(gaussian(2, 4), 1)
    with pytest.raises(ValueError, match="`group` must divide the 24 numbers in a row of the matrix, got 7. Take a"):
        gptq(gaussian(2, 24), torch.eye(24), 4, 7)
    with pytest.raises(ValueError, match="`group` must be at least 1, or None for whole rows, got 0"):
        check_grid(4, 0)
    with pytest.raises(ValueError, match=r"`moments` must be \[4, 4\], got"):
        gptq(gaussian(2, 4), torch.eye(5), 4)
    with pytest.raises(ValueError, match="`moments` must be finite, got NaN or infinity"):
        gptq(gaussian(2, 4), torch.full((4, 4), torch.nan), 4)
    with pytest.raises(ValueError, match="`model` must have weights whose scales half precision can hold"):
        rounded_codes(1e9 * gaussian(2, 4), 4)
