"""When a difference is one: bootstrap intervals, paired tests, and a correction for looking at many."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


# Resamples of a bootstrap.
RESAMPLES = 2000
# Random exchanges of a paired test: the least p-value is 2 in so many, which must be small beside 5 % over all tests.
EXCHANGES, AT_ONCE = 20_000, 500
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval at 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """
    How much a model differs from the baseline on the same examples.

    Args:
        value, low, high (`float`): Model minus baseline, with its confidence interval at 95 %.
        p_value (`float`): Of the exchange of model and baseline on every example, two-sided.
        significant (`bool`): Whether it holds after Holm's correction for all differences of the run at 5 %.
    """

    value: float
    low: float
    high: float
    p_value: float
    significant: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def ratio_interval(amounts: Sequence[float], weights: Sequence[float], seed: int = 0) -> Interval:
    """
    `sum(amounts) / sum(weights)` over independent examples, with a percentile bootstrap (Efron 1979), or
    Wilson's interval where it is a share of right answers.

    Args:
        amounts: Such as nats of each text, or 1 where an answer is right.
        weights: Such as bytes of each text, or ones.
        seed: Of the resampling.
    """
    a, w = np.asarray(amounts, float), np.asarray(weights, float)
    value = float(a.sum() / w.sum())
    if len(a) < 2:
        return Interval(value, math.nan, math.nan)
    if bool(np.isin(a, (0, 1)).all() and (w == 1).all()):
        from scipy import stats

        # A bootstrap knows nothing of a proportion near 0 and 1 (Wilson 1927).
        share = stats.binomtest(int(a.sum()), len(a)).proportion_ci(LEVEL, method="wilson")
        return Interval(value, float(share.low), float(share.high))
    low, high = _percentiles(_resampled(a, w, seed))
    return Interval(value, low, high)


def paired_difference(
    model: Sequence[float], baseline: Sequence[float], weights: Sequence[float], seed: int = 0
) -> Difference:
    """
    The difference of two weighted means over the same examples: bootstrap interval and randomisation test.

    The test asks how often a difference as large would appear if model and baseline were exchanged at random on every
    example; it assumes nothing but that examples are independent (Fisher 1935).

    Raises:
        ValueError: if the two do not have the same examples.
    """
    a, b, w = (np.asarray(values, float) for values in (model, baseline, weights))
    if not len(a) == len(b) == len(w):
        raise ValueError(f"`model` and `baseline` must have the same examples, got {len(a)} and {len(b)}.")
    differences = a - b
    value = float(differences.sum() / w.sum())
    if len(a) < 2 or math.isnan(value):
        return Difference(value, math.nan, math.nan, 1.0)
    from scipy import stats

    low, high = _percentiles(_resampled(differences, w, seed))
    test = stats.permutation_test(
        (differences,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=EXCHANGES,
        batch=AT_ONCE,
        rng=np.random.default_rng(seed),
    )
    return Difference(value, low, high, float(test.pvalue))


def paired_ratio(ratios: Sequence[float]) -> Difference:
    """The geometric mean of repeated measurements of a ratio, its interval and Student's t test of logarithms."""
    from scipy import stats

    logs = np.log(np.asarray(ratios, float))
    result = stats.ttest_1samp(logs, 0.0)
    interval = result.confidence_interval(LEVEL)
    p_value = 1.0 if math.isnan(result.pvalue) else float(result.pvalue)  # all alike: no test
    return Difference(float(np.exp(logs.mean())), float(np.exp(interval.low)), float(np.exp(interval.high)), p_value)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several hypotheses fall when all are looked at together (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: (math.isnan(p_values[index]), p_values[index]))
    fallen = [False] * len(p_values)
    for rank, index in enumerate(order):
        if not p_values[index] <= (1 - LEVEL) / (len(p_values) - rank):
            break
        fallen[index] = True
    return fallen


def _resampled(amounts: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    chosen = draw.integers(0, len(amounts), (RESAMPLES, len(amounts)))
    return amounts[chosen].sum(axis=1) / weights[chosen].sum(axis=1)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
