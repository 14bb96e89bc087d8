"""The rates that the package ships say what the experiment measured, at every distance."""

import json
import re

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


@pytest.mark.parametrize("distance", [0.0, 0.999 * related()])
def test_words_for_relatives_are_of_independent_pairs(distance):
    known, words = table(), in_words(distance)
    assert f"apart, below the {related():.3g} of relatives: none of {known['independent_pairs']} pairs" in words
    assert f"at most {known['independent_upper_by_pair'][0]:.1%}" in words and "made from another" not in words


@pytest.mark.parametrize(("distance", "least", "most"), [(related(), 10, 20), (0.99, 0, 5)])
def test_words_for_the_unrelated_are_of_derived_pairs(distance, least, most):
    total, words = sum(table()["derived_pairs"].values()), in_words(distance)
    found = re.search(
        rf"not below the {related():.3g} of relatives: (\w+) of {total} small models that were made", words
    )
    assert least <= int(found[1].replace("none", "0")) <= most and "independently" not in words
