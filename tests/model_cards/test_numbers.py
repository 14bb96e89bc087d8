"""Numbers of an evaluation that no measurement gives reach neither a card nor the Hub."""

import json
import math
from typing import Any

import pytest

from rigpt_hf.evaluation.models import evaluated
from rigpt_hf.model_cards.card import card_text
from rigpt_hf.model_cards.metadata import evaluation_of
from tests.model_cards.test_card import world  # noqa: F401  a fixture


def test_numbers_that_cannot_be_are_refused(world, tmp_path):  # noqa: F811
    written = json.loads((world / "out/results.json").read_text())
    subject = evaluated(world / "rigpt")
    place = tmp_path / "r.json"

    def refused(**changes: Any) -> str:
        results = json.loads(json.dumps(written))
        quantity = results["tasks"][0]["quantities"][0]
        quantity |= {key: changes.pop(key) for key in ("name", "unit") if key in changes}
        quantity["models"] = {"model": changes.pop("entry", quantity["models"]["model"])}
        quantity["difference"] = changes.pop("difference", quantity.get("difference", {}))
        largest = changes.pop("largest", 0.0)
        next(iter(results["tasks"][1]["models"]["model"]["errors"]["stream"].values()))["largest"] = largest
        assert not changes
        place.write_text(json.dumps(results))
        try:
            evaluation_of(place, subject)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("`results` must")
            return str(error)
        return ""

    assert evaluation_of(world / "out/results.json", subject)[1] == "model"
    for changes in (
        {"entry": {"value": None, "low": None, "high": None}},
        {"entry": {"value": 2.0000001, "low": 1.0, "high": 2.0}},
        {"name": "accuracy", "unit": "", "entry": {"value": 1}},
        {"name": "loss of int8, identity", "unit": "nats per token", "entry": {"value": -0.1}},
        {"name": "excess kurtosis of the stream", "unit": "largest of all layers", "entry": {"value": -1.2}},
        {"name": "acc_norm", "unit": "", "entry": {"value": 0.0, "low": 0.0, "high": 0.2}},
        {"difference": {"value": -1.0, "low": -2.0, "high": -0.5}},
        {"largest": None},
    ):
        assert not refused(**changes), changes
    finite, interval = "a finite number or null", "in its interval from"
    for rule, changes in (
        (finite, {"entry": {"value": math.nan}}),
        (finite, {"entry": {"value": math.inf}}),
        (finite, {"entry": {"value": "3"}}),
        (finite, {"entry": {"value": True}}),
        (finite, {"entry": {"value": 3.0, "low": math.nan, "high": 4.0}}),
        (finite, {"difference": {"value": math.inf}}),
        (finite, {"largest": math.inf}),
        (interval, {"entry": {"value": 3.0, "low": 1.0, "high": 2.0}}),
        (interval, {"entry": {"value": 0.5, "low": 1.0, "high": 2.0}}),
        (interval, {"entry": {"value": None, "low": 2.0, "high": 1.0}}),
        (interval, {"difference": {"value": 1.0, "low": -2.0, "high": -0.5}}),
        ("at least 0", {"entry": {"value": -3.0}}),
        ("at least 0", {"name": "bits per byte", "unit": "bits", "entry": {"value": -1}}),
        ("at least 0", {"name": "time to first token", "unit": "s", "entry": {"value": -1}}),
        ("at least 0", {"name": "loss", "unit": "nats per token", "entry": {"value": -1}}),
        ("at least 0", {"name": "word_perplexity", "unit": "", "entry": {"value": -1}}),
        ("at least 0", {"largest": -1e-9}),
        ("from 0 to 1", {"name": "accuracy", "unit": "", "entry": {"value": 1.5}}),
        ("from 0 to 1", {"name": "accuracy, normalized", "unit": "", "entry": {"value": -0.5}}),
        ("from 0 to 1", {"name": "acc_norm (3 shots)", "unit": "", "entry": {"value": 50.0}}),
        ("from 0 to 1", {"name": "exact_match (strict)", "unit": "", "entry": {"value": 1.5}}),
        ("cannot be shown", {"entry": 5}),
        ("cannot be shown", {"entry": {"value": 10**400}}),
    ):
        line = refused(**changes)
        assert rule in line and (rule == "cannot be shown" or str(place) in line), (changes, line)
    with pytest.raises(ValueError, match="cannot be shown"):
        card_text(world / "rigpt", results=place)
