"""The order of windows: a bijection in every epoch, shuffled, and computed from any position on."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from rigpt_hf.training.data import window_index


SIZES = (1, 2, 3, 4, 5, 7, 10, 16, 17, 100, 1021, 4097, 65_536)
# A rank correlation of n shuffled numbers has the standard deviation 1 / sqrt(n - 1); five of them are never seen.
DEVIATIONS = 5


def epoch(number: int, windows: int, seed: int = 0) -> np.ndarray:
    return window_index(np.arange(windows) + number * windows, windows, seed)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what shuffling gives."""
    return abs(spearmanr(a, b).statistic) * math.sqrt(len(a) - 1)


def test_each_epoch_holds_every_window_once():
    for windows, number in itertools.product(SIZES, (0, 1, 1000)):
        assert np.array_equal(np.sort(epoch(number, windows, seed=3)), np.arange(windows)), (windows, number)
    # A stretch that is no epoch is no permutation.
    assert len(np.unique(window_index(np.arange(1000) + 500, 1000, seed=3))) < 1000


def test_epochs_and_seeds_are_shuffled_and_unrelated():
    size = 20_000
    identity, first = np.arange(size), epoch(0, size)
    for other in (identity, epoch(1, size), epoch(0, size, seed=1), np.roll(first, 1), epoch(0, size, seed=-1)):
        assert correlation(first, other) < DEVIATIONS
    # What no shuffle looks like: the identity, and one that is the same in each epoch.
    assert correlation(identity, identity) > DEVIATIONS
    assert correlation(first, epoch(0, size)) > DEVIATIONS


def test_small_sizes_come_in_all_orders():
    """Each of the 24 orders of four windows about as often, where the alternation of two orders would not do."""
    epochs = window_index(np.arange(4 * 4800), 4, seed=0).reshape(-1, 4)
    counts = np.unique(epochs, axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert np.abs(counts - 200).max() < DEVIATIONS * math.sqrt(200)


def test_a_position_alone_gives_what_it_gives_among_others():
    positions = np.arange(990, 1010).reshape(4, 5)  # over the end of an epoch
    together = window_index(positions, 1000, seed=5)
    assert together.shape == positions.shape and together.dtype == np.int64
    alone = [[window_index(int(position), 1000, seed=5) for position in row] for row in positions]
    assert together.tolist() == alone
    assert isinstance(alone[0][0], int)


def test_far_positions_and_many_windows():
    windows = 2**40 + 1
    far = window_index(np.array([2**62, 2**62 + 1]), windows, seed=2**64 - 1)
    assert (far >= 0).all() and (far < windows).all() and far[0] != far[1]


def test_refusals():
    with pytest.raises(ValueError, match="`windows` must be at least 1, got 0"):
        window_index(0, 0, 0)
    with pytest.raises(ValueError, match="`position` must not be negative, got -1"):
        window_index(np.array([1, -1]), 5, 0)
