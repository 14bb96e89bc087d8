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
    """The experiment's rates for pairs whose fingerprints are as near as this."""
    known = table()
    row = min(bisect_left(known["distance"], distance), len(known["distance"]) - 1)
    share, total = known["independent"][row], known["independent_pairs"]
    by_model, by_pair = known["independent_upper"][row], known["independent_upper_by_pair"][row]
    farther = {kind: 1 - shares[row] for kind, shares in known["derived"].items()}
    missed = sum(part * known["derived_pairs"][kind] for kind, part in farther.items())
    derived = sum(known["derived_pairs"].values())
    return (
        f"Fingerprints {distance:.3g} apart (relatives: below {related():.3g}). Of {total} pairs of independently "
        f"trained models {round(share * total)} were as near: at most {by_pair:.1%} of pairs, if none shared a model, "
        f"and {by_model:.0%} by model, at 95 %. Of {derived} derived pairs {round(missed)} were farther apart. Small "
        "models: see docs/provenance.md."
    )
