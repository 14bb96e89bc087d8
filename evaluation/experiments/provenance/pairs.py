"""Which models are held against which, and what every statistic says of each pair."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rigpt_hf.checkpoints.written import json_sha256

from ..run_records import RunRecords
from .derive import DERIVATIONS, DISGUISED, derive, disguise, relative_change
from .models import Base, Zoo, independent_pairs, relation
from .rates import Scored
from .statistics import STATISTICS


# Under this name the relative change of weights is recorded, which is no statistic: it needs both in one frame.
CHANGE = "relative change"


@dataclass(frozen=True)
class Specimen:
    """A base model, or what a derivation makes of it, perhaps then in other frames."""

    base: Base
    derivation: str | None = None
    disguised: bool = False

    @property
    def name(self) -> str:
        """`small-llama-0.full-long.disguised`."""
        return ".".join([self.base.name, *filter(None, [self.derivation]), *([DISGUISED] if self.disguised else [])])

    @property
    def kind(self) -> str:
        """The kind of derivation."""
        return DISGUISED if self.derivation is None else DERIVATIONS[self.derivation].kind

    @property
    def strength(self) -> str:
        """How much of it."""
        return "all frames" if self.derivation is None else DERIVATIONS[self.derivation].strength

    def undisguised(self, zoo: Zoo) -> Any:
        """The model before it is put into other frames."""
        return zoo.base(self.base) if self.derivation is None else derive(zoo, self.base, self.derivation)

    def model(self, zoo: Zoo) -> Any:
        """The model."""
        model = self.undisguised(zoo)
        return disguise(model, self.base.seed) if self.disguised else model


@dataclass(frozen=True)
class Pair:
    """A base model A and a model B, which was made from it or has nothing to do with it."""

    a: Base
    b: Specimen

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.a.name} {self.b.name}"

    @property
    def independent(self) -> bool:
        """Whether B was not made from A."""
        return self.a != self.b.base

    def scored(self, likeness: float | None) -> Scored:
        """With what a statistic says."""
        return Scored(
            (self.a.name, self.b.base.name),
            (self.a.half, self.b.base.half),
            self.independent,
            relation(self.a, self.b.base) if self.independent else self.b.kind,
            self.b.strength,
            self.b.disguised,
            likeness,
        )


def made_from(base: Base) -> Iterator[Specimen]:
    """All that is made from a base: in other frames, by each derivation, and by that and then in other frames."""
    yield Specimen(base, disguised=True)
    for name in DERIVATIONS:
        yield Specimen(base, name)
        yield Specimen(base, name, disguised=True)


def pairs_with(base: Base, models: Sequence[Base], sources: int) -> dict[str, list[Pair]]:
    """
    The pairs whose B is a base, or made from it, in two parts.

    The `independent` are those with other bases before it. Of the `derived`, each is held against what it was made
    from, and against a model of the same shape and half that has nothing to do with it.
    """
    parts = {"independent": [Pair(a, Specimen(b)) for a, b in independent_pairs(models) if b == base]}
    if base.index < sources:
        made = list(made_from(base))
        parts["derived"] = [Pair(a, specimen) for specimen in made for a in (base, base.bystander)]
    return {part: pairs for part, pairs in parts.items() if pairs}


class Measurements:
    """
    The answers of statistics on pairs; what is known already, in the zoo's folder, is not asked again.

    There `values` has a file for each. One whose code has changed is asked again once its file is removed.

    Args:
        zoo (`Zoo`): where models come from.
        names (`Sequence[str]`): keys of `STATISTICS`.
    """

    def __init__(self, zoo: Zoo, names: Sequence[str]):
        self.zoo, self.names = zoo, list(names)
        folder = zoo.cache / "values"
        self.records = {
            name: RunRecords(folder / f"{name.replace(' ', '-')}.json", "provenance", {"statistic": name})
            for name in [*self.names, CHANGE]
        }
        self.prepared: dict[tuple[str, str], Any] = {}

    def of(self, part: str, pairs: Sequence[Pair]) -> dict[str, dict[str, float | None]]:
        """By statistic and by name of the pair; all `pairs` have one base as their B, or what it is made from."""
        names = json_sha256([pair.name for pair in pairs])
        key = {"base": pairs[0].b.base.name, "part": part, "pairs": names}
        missing = [name for name in self.records if not self.records[name].done(**key)]
        made = self._measured(pairs, missing)
        for name in missing:
            self.records[name].run(partial(made.__getitem__, name), **key)
        return {name: record.done(**key)[0]["values"] for name, record in self.records.items()}

    def _measured(self, pairs: Sequence[Pair], names: Sequence[str]) -> dict[str, Any]:
        made: dict[str, Any] = {name: {"values": {}, "seconds_of_pairs": 0.0} for name in names}
        specimens: dict[Specimen, list[Pair]] = {}
        for pair in pairs:
            specimens.setdefault(pair.b, []).append(pair)
        for specimen, members in specimens.items() if names else ():
            model = specimen.model(self.zoo)
            for name in names:
                began = time.perf_counter()
                if name == CHANGE:
                    values = self._changes(specimen, members, model)
                else:
                    kept = STATISTICS[name].prepare(model)
                    values = {p.name: STATISTICS[name].likeness(self._of_base(name, p.a), kept) for p in members}
                made[name]["values"] |= values
                made[name]["seconds_of_pairs"] += time.perf_counter() - began
        return made

    def _of_base(self, name: str, base: Base) -> Any:
        if (name, base.name) not in self.prepared:
            self.prepared[name, base.name] = STATISTICS[name].prepare(self.zoo.base(base))
        return self.prepared[name, base.name]

    def _changes(self, specimen: Specimen, members: Sequence[Pair], model: Any) -> dict[str, float | None]:
        if specimen.disguised or specimen.derivation is None:
            return {}
        return {p.name: relative_change(self.zoo.base(p.a), model) for p in members if not p.independent}


def measure_all(
    measurements: Measurements, models: Sequence[Base], sources: int, tick: Callable[[str], None]
) -> tuple[list[Pair], dict[str, dict[str, float | None]]]:
    """All pairs of a zoo, and by statistic and name of the pair how alike the two are."""
    pairs: list[Pair] = []
    values: dict[str, dict[str, float | None]] = {}
    for base in models:
        for part, members in pairs_with(base, models, sources).items():
            pairs += members
            for name, found in measurements.of(part, members).items():
                values.setdefault(name, {}).update(found)
        tick(base.name)
    return pairs, values
