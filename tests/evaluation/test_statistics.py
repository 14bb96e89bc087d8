"""Intervals that cover, tests that reject no more than they say, and a correction that is Holm's."""

import math

import numpy as np
import pytest

from rigpt_hf.evaluation.harness import statistics
from rigpt_hf.evaluation.harness.statistics import holm, paired_difference, paired_ratio, ratio_interval


EXCHANGES = statistics.EXCHANGES


@pytest.fixture
def all_exchanges(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "EXCHANGES", EXCHANGES)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        weights = draw.integers(5, 50, 80)
        amounts = weights * 2.0 + draw.normal(0, 10, 80)
        interval = ratio_interval(amounts, weights, seed)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.995


def test_the_interval_narrows_with_more_examples():
    draw = np.random.default_rng(1)
    widths = []
    for count in (100, 2500):
        interval = ratio_interval(draw.normal(1, 1, count), np.ones(count))
        assert interval.low < interval.value < interval.high
        widths.append(interval.high - interval.low)
    assert widths[1] == pytest.approx(widths[0] / 5, rel=0.25)


def test_equal_models_are_seldom_told_apart():
    draw = np.random.default_rng(2)
    p_values = []
    for seed in range(100):
        a, b = draw.normal(0, 1, (2, 40))
        p_values.append(paired_difference(a, b, np.ones(40), seed).p_value)
    assert sum(p < 0.05 for p in p_values) <= 12
    assert 0.3 < np.mean(p_values) < 0.7


def test_a_difference_that_pairs_show_is_found(all_exchanges):
    """Much smaller than the spread of the examples, but the same on all of them."""
    draw = np.random.default_rng(3)
    base = draw.normal(0, 10, 60)
    difference = paired_difference(base - 0.5 + draw.normal(0, 0.2, 60), base, np.ones(60))
    assert difference.value == pytest.approx(-0.5, abs=0.1)
    assert difference.low < difference.value < difference.high < 0
    assert difference.p_value < 0.001


def test_weights_count():
    difference = paired_difference([4.0, 0.0], [0.0, 0.0], [1, 3])
    assert difference.value == 1.0


def test_few_examples_prove_nothing():
    assert paired_difference([5.0], [1.0], [1.0]).p_value == 1.0
    assert paired_difference([5.0, 6.0], [1.0, 1.0], [1.0, 1.0]).p_value >= 0.5
    assert math.isnan(ratio_interval([3.0], [1.0]).low)


def test_other_examples_are_refused():
    with pytest.raises(ValueError, match="`model` and `baseline` must have the same examples, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0])


def test_shares_near_the_edge_have_an_interval():
    """All right of thirty is no proof of certainty; a bootstrap would say so."""
    interval = ratio_interval([1.0] * 30, [1.0] * 30)
    assert interval.value == interval.high == 1.0 and 0.8 < interval.low < 0.95
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        interval = ratio_interval((draw.random(60) < 0.03).astype(float), np.ones(60))
        covered += interval.low <= 0.03 <= interval.high
    assert covered / 300 > 0.9


def test_many_differences_do_not_hide_a_large_one(all_exchanges):
    """The least p-value there is must survive the correction for hundreds of others."""
    base = np.random.default_rng(6).normal(0, 1, 200)
    p_value = paired_difference(base + 1, base, np.ones(200)).p_value
    assert holm([p_value] + [0.9] * 300)[0]


def test_ratios_that_are_all_one_are_no_difference():
    assert paired_ratio([1.0] * 5).p_value == 1.0


def test_ratios_are_symmetric():
    """Twice as fast and half as fast are the same finding."""
    ratios = [2.0, 2.2, 1.9, 2.1]
    faster, slower = paired_ratio(ratios), paired_ratio([1 / each for each in ratios])
    assert faster.value == pytest.approx(1 / slower.value) and faster.p_value == pytest.approx(slower.p_value)
    assert 1 < faster.low < faster.value < faster.high


def test_holm():
    for p_values, fallen in (
        ([0.01, 0.04, 0.03], [True, False, False]),  # 0.01 <= 0.05/3, 0.03 > 0.05/2
        ([0.001, 0.02, 0.04], [True, True, True]),
        ([0.02, 0.02, 0.02], [False, False, False]),
        ([], []),
        ([float("nan"), 0.001], [False, True]),
    ):
        assert holm(p_values) == fallen
