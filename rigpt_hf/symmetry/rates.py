"""
The error rates that stand behind a verdict: how far apart fingerprints of independent and of derived models were.

`rates.json` is what `evaluation/experiments/provenance` measured and wrote; no number of it is written by hand.
"""

import json
from bisect import bisect_left
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def table() -> dict[str, Any]:
    """The rates as measured: shares of pairs at or below each distance of a grid."""
    content: dict[str, Any] = json.loads(files(__package__).joinpath("rates.json").read_text(encoding="utf-8"))
    return content


def related() -> float:
    """Fingerprints that are nearer than this are of relatives: half way from the nearest independent pair seen."""
    return float(table()["threshold"])


def in_words(distance: float) -> str:
    """What the experiment says of the verdict, relatives or unrelated, that fingerprints as far apart as this give."""
    known = table()
    row = min(bisect_left(known["distance"], distance), len(known["distance"]) - 1)
    start = f"Fingerprints are {distance:.3g} apart, {{}} the {related():.3g} of relatives: "
    if distance < related():
        total, near = known["independent_pairs"], round(known["independent"][row] * known["independent_pairs"])
        by_model, by_pair = known["independent_upper"][row], known["independent_upper_by_pair"][row]
        return start.format("below") + (
            f"{near or 'none'} of {total} pairs of independently trained small models came as near, so at most "
            f"{by_pair:.1%} of such pairs do, or {by_model:.0%} by the most cautious count (docs/provenance.md)."
        )
    derived = sum(known["derived_pairs"].values())
    missed = round(sum((1 - shares[row]) * known["derived_pairs"][kind] for kind, shares in known["derived"].items()))
    return start.format("not below") + (
        f"{missed or 'none'} of {derived} small models that were made from another came out as far from it, and yet "
        "kinship may be overlooked (docs/provenance.md)."
    )
