"""
How often a statistic misleads: ROC, thresholds that one half of the models chooses for the other, and intervals.

Pairs that share a model are no independent examples, so intervals are clustered by model: the bootstrap draws models
and counts a pair as often as both of its models were drawn. It says nothing where no error was made; there the bound
is that of Clopper and Pearson (1934), as if only so many pairs had been looked at as can be chosen of which no two
share a model. The mean over all pairs is one over such choices, which is at least as certain (Hoeffding 1963).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from rigpt_hf.evaluation.harness.statistics import LEVEL, Interval


RESAMPLES = 1000
# The part of the derived pairs that a threshold may leave out.
MAY_BE_MISSED = 0.03
# Distances at which the rates are written down that the package ships.
GRID = 101


@dataclass(frozen=True)
class Scored:
    """
    A pair of models and what a statistic says of it.

    Args:
        models (`tuple[str, str]`): the two that were trained from random weights, of which the pair is or was made.
        halves (`tuple[int, int]`): in which half of the models these are.
        independent (`bool`): whether neither has anything to do with the other.
        kind (`str`), strength (`str`), disguised (`bool`): what was done to B.
        likeness (`float`, *optional*): larger means more alike; `None` where the statistic cannot say.
    """

    models: tuple[str, str]
    halves: tuple[int, int]
    independent: bool
    kind: str
    strength: str
    disguised: bool
    likeness: float | None

    @property
    def score(self) -> float:
        """The likeness; below all others where there is none, as nobody is accused then."""
        return -math.inf if self.likeness is None else self.likeness

    @property
    def half(self) -> int | None:
        """The half that both models are in, if they are in one."""
        return self.halves[0] if self.halves[0] == self.halves[1] else None


def auc(derived: Sequence[float], independent: Sequence[float], counts: tuple[Any, Any] | None = None) -> float:
    """
    The share of (derived, independent) in which the derived scores higher, ties counted half; not a number for none.

    Args:
        derived, independent: Scores; minus infinity is below all others.
        counts: How often each of either counts; once if not given.
    """
    u, v = (np.ones(len(derived)), np.ones(len(independent))) if counts is None else counts
    if not u.sum() * v.sum():
        return math.nan
    values, places = np.unique(np.concatenate((derived, independent)), return_inverse=True)
    at, below = places[: len(derived)], np.bincount(places[len(derived) :], weights=v, minlength=len(values))
    beaten = np.concatenate(([0.0], np.cumsum(below)[:-1])) + below / 2
    return float((u * beaten[at]).sum() / (u.sum() * v.sum()))


def roc(derived: Sequence[float], independent: Sequence[float]) -> list[tuple[float, float, float]]:
    """`(threshold, share of independent, share of derived)` at or above each threshold, from the highest down."""
    a, b = np.sort(np.asarray(derived, float)), np.sort(np.asarray(independent, float))
    thresholds = np.unique(np.concatenate((a, b)))[::-1]
    thresholds = thresholds[np.isfinite(thresholds)]
    above = [1 - np.searchsorted(side, thresholds) / len(side) for side in (b, a)]
    return [(float(t), float(x), float(y)) for t, x, y in zip(thresholds, *above, strict=True)]


def multiplicities(pairs: Sequence[Scored], seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each pair counts when models are drawn with replacement, `[resamples, pairs]`."""
    names = sorted({name for pair in pairs for name in pair.models})
    number = {name: index for index, name in enumerate(names)}
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    counts = np.stack([np.bincount(draw, minlength=len(names)) for draw in draws])
    first, second = (np.array([number[pair.models[side]] for pair in pairs], int) for side in (0, 1))
    return np.where(first == second, counts[:, first], counts[:, first] * counts[:, second])


def auc_interval(derived: Sequence[Scored], independent: Sequence[Scored], resamples: int = RESAMPLES) -> Interval:
    """The AUC with its bootstrap interval, models drawn."""
    scores = [pair.score for pair in derived], [pair.score for pair in independent]
    value = auc(*scores)
    counts = multiplicities([*derived, *independent], resamples=resamples)
    drawn = [auc(*scores, (row[: len(derived)], row[len(derived) :])) for row in counts]
    drawn = [each for each in drawn if not math.isnan(each)]
    if not drawn:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Rate:
    """
    A share of pairs.

    Args:
        count, total (`int`): pairs that it happened to, and all.
        value, low, high (`float`): the share and its bootstrap interval at 95 %, models drawn.
        pairs_upper (`float`): the upper bound of Clopper and Pearson at 95 %, as if no two pairs shared a model.
        models (`int`): models in all pairs; apart (`int`): so many pairs of them share none.
        apart_upper (`float`): the upper bound as if only `apart` pairs had been looked at.
    """

    count: int
    total: int
    value: float
    low: float
    high: float
    pairs_upper: float
    models: int
    apart: int
    apart_upper: float


def upper_bound(count: int, total: int) -> float:
    """The one-sided upper bound at 95 % of a share, of which `count` in `total` were seen (Clopper and Pearson)."""
    return 1.0 if count >= total else float(stats.beta.ppf(LEVEL, count + 1, total - count))


def rate(pairs: Sequence[Scored], happened: Sequence[bool], resamples: int = RESAMPLES) -> Rate:
    """The share of pairs that something happened to; without `resamples`, without a bootstrap interval."""
    hit, total = np.asarray(happened, float), len(pairs)
    low = high = math.nan
    if total and resamples:
        counts = multiplicities(pairs, resamples=resamples)
        sums = counts.sum(1)
        shares = (counts @ hit)[sums > 0] / sums[sums > 0]
        low, high = map(float, np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    count, models = int(hit.sum()), {name for pair in pairs for name in pair.models}
    value = count / total if total else math.nan
    apart = min(len(models) // (1 if all(len(set(pair.models)) == 1 for pair in pairs) else 2), total)
    bounds = upper_bound(count, total), upper_bound(math.ceil(value * apart) if total else 0, apart)
    return Rate(count, total, value, low, high, bounds[0], len(models), apart, bounds[1])


def choose_threshold(pairs: Sequence[Scored]) -> float:
    """
    The score that all but 3 % of the derived pairs reach; if an independent pair reaches it, the next above that one.

    A pair is called derived if it scores at least this. To accuse falsely is worse than to miss: the few derived pairs
    that are least like what they were made from do not draw the line nearer to the independent ones.
    """
    derived = sorted(pair.score for pair in pairs if not pair.independent)
    highest = max((pair.score for pair in pairs if pair.independent), default=-math.inf)
    if not derived:
        return math.inf
    return max(derived[int(MAY_BE_MISSED * len(derived))], math.nextafter(highest, math.inf))


@dataclass(frozen=True)
class Verdicts:
    """The errors of each half's threshold on the other half: false accusations, and derived pairs that were missed."""

    thresholds: tuple[float, float]
    false_accusations: Rate
    missed: dict[str, Rate]


def cross_verdicts(pairs: Sequence[Scored]) -> Verdicts:
    """Thresholds chosen on one half of the models and reported on the other, both ways; pairs across are left out."""
    halves = [[pair for pair in pairs if pair.half == half] for half in (0, 1)]
    thresholds = choose_threshold(halves[0]), choose_threshold(halves[1])

    def accused(pair: Scored) -> bool:
        assert pair.half is not None
        return pair.score >= thresholds[1 - pair.half]

    judged = [*halves[0], *halves[1]]
    independent = [pair for pair in judged if pair.independent]
    missed = {
        name: rate(members, [not accused(pair) for pair in members])
        for name, members in groups([pair for pair in judged if not pair.independent]).items()
    }
    return Verdicts(thresholds, rate(independent, [accused(pair) for pair in independent]), missed)


def groups(derived: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Pairs by what was done to B."""
    found: dict[str, list[Scored]] = {}
    for pair in derived:
        found.setdefault(named(pair), []).append(pair)
    return dict(sorted(found.items()))


def named(pair: Scored) -> str:
    """The derivation of B, in words."""
    return f"{pair.kind}: {pair.strength}" + (
        ", then disguised" if pair.disguised and pair.kind != "disguised" else ""
    )


def summary(pairs: Sequence[Scored], resamples: int = RESAMPLES) -> dict[str, Any]:
    """All that is published of one statistic."""
    independent = [pair for pair in pairs if pair.independent]
    derived = [pair for pair in pairs if not pair.independent]
    by_kind = {}
    for name, members in groups(derived).items():
        interval = auc_interval(members, independent, resamples)
        silent = sum(pair.likeness is None for pair in members)
        by_kind[name] = asdict(interval) | {"pairs": len(members), "cannot_say": silent}
    costs = {
        name: by_kind[name]["value"] - by_kind[f"{name}, then disguised"]["value"]
        for name in by_kind
        if f"{name}, then disguised" in by_kind
    }
    verdicts = cross_verdicts(pairs)
    return {
        "auc": asdict(auc_interval(derived, independent, resamples)) | {"pairs": len(derived)},
        "auc_by_kind": by_kind,
        "cost_of_disguise": costs,
        "thresholds": verdicts.thresholds,
        "false_accusations": asdict(verdicts.false_accusations),
        "missed": {name: asdict(each) for name, each in verdicts.missed.items()},
        "highest_independent": {
            kind: max(pair.score for pair in independent if pair.kind == kind)
            for kind in sorted({pair.kind for pair in independent})
        },
        "lowest_derived": {name: min(pair.score for pair in members) for name, members in groups(derived).items()},
        "independent_pairs": len(independent),
        "independent_cannot_say": sum(pair.likeness is None for pair in independent),
        "models": len({name for pair in pairs for name in pair.models}),
    }


def rates_by_distance(pairs: Sequence[Scored], statistic: str) -> dict[str, Any]:
    """
    The table that the package ships: at each distance, 1 minus the likeness, how many pairs are at least as close.

    Of independent pairs it has the share, and its upper bounds at 95 % as of [`Rate`], clustered by model and not; of
    derived pairs the share by kind. A statistic that cannot say counts as far away.
    """
    independent = [pair for pair in pairs if pair.independent]
    kinds: dict[str, list[Scored]] = {}
    for pair in pairs:
        if not pair.independent:
            kinds.setdefault(pair.kind, []).append(pair)
    distances = [round(step / (GRID - 1), 4) for step in range(GRID)]

    def share(members: Sequence[Scored], distance: float) -> float:
        return round(sum(1 - pair.score <= distance for pair in members) / len(members), 5)

    falsely = [rate(independent, [1 - pair.score <= distance for pair in independent], 0) for distance in distances]
    return {
        "statistic": statistic,
        "threshold": round(1 - choose_threshold(pairs), 4),
        "independent_pairs": len(independent),
        "models": len({name for pair in independent for name in pair.models}),
        "distance": distances,
        "independent": [round(each.value, 5) for each in falsely],
        "independent_upper": [round(each.apart_upper, 5) for each in falsely],
        "independent_upper_by_pair": [round(each.pairs_upper, 5) for each in falsely],
        "derived": {kind: [share(members, distance) for distance in distances] for kind, members in kinds.items()},
        "derived_pairs": {kind: len(members) for kind, members in kinds.items()},
    }
