"""The rates that the package ships say what the experiment measured, at every distance."""

import json

import pytest

from rigpt_hf.symmetry.rates import in_words, related, table
from tests.processes import ROOT


def test_the_rates_are_those_of_the_results():
    results = ROOT / "evaluation" / "results" / "provenance.json"
    assert json.loads(results.read_text())["rates"]["fingerprint"] == table()


def test_rates_grow_with_the_distance():
    known = table()
    for shares in (known["independent"], known["independent_upper"], known["independent_upper_by_pair"]):
        assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1
    assert all(shares == sorted(shares) for shares in known["derived"].values()) and len(known["derived"]) >= 8
    assert known["independent_pairs"] >= 150 and sum(known["derived_pairs"].values()) >= 300
    assert 0.3 < related() < 0.9


@pytest.mark.parametrize(("distance", "accused"), [(0.0, True), (1.0, False)])
def test_in_words(distance, accused):
    known = table()
    words = in_words(distance)
    assert f"Of {known['independent_pairs']} pairs" in words and f"below {related():.3g}" in words
    assert ("models 0 were as near" in words) is accused
