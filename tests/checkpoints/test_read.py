"""Weights that are read: parts of fused maps, and numbers that are none."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from rigpt_hf.checkpoints.weights import Rows, Weights


def test_rows_of_fused_maps_are_read_and_placed():
    """Parts one after the other, and interleaved per head as in some families; of weights and of biases."""
    fused = torch.arange(24.0).reshape(12, 2)
    weights = Weights({"fused": fused, "transposed": fused.T, "bias": fused[:, 0]})
    for period, lengths in ((12, (6, 3, 3)), (6, (3, 2, 1)), (4, (2, 2))):
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        rows = [Rows(start, length, period) for start, length in zip(starts, lengths, strict=True)]
        whole = torch.zeros(12, 2)
        for each in rows:
            kept = [index for index in range(12) if each.start <= index % period < each.start + each.length]
            part = weights.read("fused", each)
            assert torch.equal(part, fused[kept]) and len(kept) < 12
            assert torch.equal(weights.read("transposed", each, 1), fused[kept].T)
            assert torch.equal(weights.read("bias", each), fused[kept, 0])
            each.place(part, whole)
        assert torch.equal(whole, fused)
    with pytest.raises(ValueError, match="`fused` must be made of parts of 5 rows by the configuration, got 12"):
        weights.read("fused", Rows(0, 1, 5))


def test_pairs_of_neighbours_become_halves_and_neighbours_again():
    """Of every head of a map, of a part of a head, and of one part of a fused map; of weights and of biases."""
    fused = torch.arange(32.0).reshape(16, 2)
    weights = Weights({"fused": fused, "transposed": fused.T, "bias": fused[:, 0]})
    for rows, kept in (
        (Rows(0, 8, 8, interleaved=8), [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]),
        (Rows(0, 8, 8, interleaved=4), [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]),
        (Rows(8, 4, 16, interleaved=4), [8, 10, 9, 11]),
        (Rows(0, 8, 8, swapped=True), [4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11]),
    ):
        part, whole = weights.read("fused", rows), torch.zeros(16, 2)
        assert torch.equal(part, fused[kept])
        assert torch.equal(weights.read("transposed", rows, 1), fused[kept].T)
        assert torch.equal(weights.read("bias", rows), fused[kept, 0])
        rows.place(part, whole)
        assert torch.equal(whole[sorted(kept)], fused[sorted(kept)])
        replace(rows, interleaved=0, swapped=False).place(part, whole)
        assert not torch.equal(whole[sorted(kept)], fused[sorted(kept)])


def test_numbers_that_are_not_finite_are_named():
    for value, dtype in product((float("nan"), float("inf"), -float("inf")), (torch.float32, torch.bfloat16)):
        tensor = torch.ones(3, 4, dtype=dtype)
        weights = Weights({"good": tensor.clone(), "bad": tensor, "mask": torch.ones(2, dtype=torch.uint8)})
        tensor[1, 2] = value
        assert weights.read("good").shape == (3, 4)
        with pytest.raises(ValueError, match="`mask` must hold numbers of floating point, got torch.uint8"):
            weights.read("mask")
        with pytest.raises(ValueError, match="`bad` must hold finite numbers, got NaN or infinity"):
            weights.read("bad")
