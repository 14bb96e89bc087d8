"""Numbers of an evaluation that no measurement gives reach neither a card nor the Hub."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rigpt_hf.evaluation.models import evaluated
from rigpt_hf.model_cards.card import card_text
from rigpt_hf.model_cards.metadata import evaluation_of
from rigpt_hf.model_cards.numbers import check_numbers
from tests.model_cards.test_card import world  # noqa: F401  a fixture


RECORDED = Path(__file__).parents[2] / "evaluation/results"
FINITE, INTERVAL, COUNT = "a finite number or null", "in its interval from", "a whole number from 1"


@pytest.fixture
def refused(world, tmp_path):  # noqa: F811
    """What is said of the results of the small evaluation once they are changed; nothing if they are taken."""
    written = (world / "out/results.json").read_text()
    subject, place = evaluated(world / "rigpt"), tmp_path / "r.json"

    def said(change: Callable[[dict[str, Any]], Any]) -> str:
        results = json.loads(written)
        change(results)
        place.write_text(json.dumps(results))
        try:
            evaluation_of(place, subject)
        except ValueError as error:
            line = str(error)
            assert "\n" not in line and line.startswith("`results` must") and len(line) < 500
            assert "cannot be shown" in line or (str(place) in line and line.endswith("Run rigpt evaluate again."))
            return line
        return ""

    said.place, said.subject = place, subject  # type: ignore[attr-defined]
    return said


def quantity_with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A quantity that is recorded as it is told, of both models, so that nothing contradicts it."""

    def change(results: dict[str, Any]) -> None:
        task = results["tasks"][0]
        quantity = task["quantities"][0]
        quantity |= {key: changes[key] for key in ("name", "unit", "difference") if key in changes}
        entry = changes.get("entry", quantity["models"]["model"])
        quantity["models"] = {"model": entry, "baseline": changes.get("baseline", entry)}
        for model, own in quantity["models"].items():
            value = own.get("value") if isinstance(own, dict) else None
            task["models"][model] = {"metrics": {quantity["name"]: value}}
        task["quantities"] = [quantity]

    return change


def difference(value: Any, low: Any = None, high: Any = None, **more: Any) -> dict[str, Any]:
    test = {"p_value": 0.5, "significant": False, "kind": "difference"}
    return {"value": value, "low": low, "high": high} | test | more


def largest_error(value: Any, mean: Any = 0.0) -> Callable[[dict[str, Any]], None]:
    """The gauge error of every frame, the largest of them, and what the table says."""

    def change(results: dict[str, Any]) -> None:
        task = results["tasks"][1]
        own = task["models"]["model"]
        own["errors"] = {name: {"float64": {"mean": mean, "largest": value}} for name in own["errors"]}
        own["largest"] = {"float64": value}
        task["quantities"] = task["quantities"][:1]
        task["quantities"][0]["models"]["model"]["value"] = value

    return change


def test_numbers_that_cannot_be_are_refused(refused, world):  # noqa: F811
    assert evaluation_of(world / "out/results.json", refused.subject)[1] == "model"
    for changes in (
        {"entry": {"value": None, "low": None, "high": None}},
        {"entry": {"value": 2.0000001, "low": 1.0, "high": 2.0}},
        {"entry": {"value": 1}},
        {"name": "accuracy", "unit": "", "entry": {"value": 1}},
        {"name": "loss of int8, identity", "unit": "nats per token", "entry": {"value": -0.1}},
        {"name": "excess kurtosis of the stream", "unit": "largest of all layers", "entry": {"value": -1.2}},
        {"name": "acc_norm", "unit": "", "entry": {"value": 0.0, "low": 0.0, "high": 0.2}},
        {"entry": {"value": 2.0}, "baseline": {"value": 3.0}, "difference": difference(-1.0, -2.0, -0.5)},
        {"difference": difference(1.2, 1.1, 1.3, kind="ratio of speeds")},
    ):
        assert not refused(quantity_with(**changes)), changes
    for rule, changes in (
        (FINITE, {"entry": {"value": math.nan}}),
        (FINITE, {"entry": {"value": math.inf}}),
        (FINITE, {"entry": {"value": "3"}}),
        (FINITE, {"entry": {"value": True}}),
        (FINITE, {"entry": {"value": 3.0, "low": math.nan, "high": 4.0}}),
        (FINITE, {"entry": {"value": 3.0, "scale": "x"}}),
        (FINITE, {"difference": difference(math.inf)}),
        (FINITE, {"difference": difference(0.0, p_value="x")}),
        (INTERVAL, {"entry": {"value": 3.0, "low": 1.0, "high": 2.0}}),
        (INTERVAL, {"entry": {"value": 1.5, "low": 2.0, "high": 3.0}}),
        (INTERVAL, {"entry": {"value": None, "low": 2.0, "high": 1.0}}),
        (INTERVAL, {"difference": difference(1.0, -2.0, -0.5)}),
        ("at least 1", {"entry": {"value": -3.0}}),
        ("at least 1", {"entry": {"value": 0.5}}),
        ("at least 1", {"entry": {"value": 2.0, "low": 0.5, "high": 3.0}}),
        ("at least 1", {"name": "word_perplexity", "unit": "", "entry": {"value": 0.9}}),
        ("at least 1", {"name": "peak memory", "unit": "bytes", "entry": {"value": 0}}),
        ("at least 1", {"name": "crest factor of the stream", "unit": "", "entry": {"value": 0.9}}),
        ("at least -2", {"name": "excess kurtosis of the stream", "unit": "", "entry": {"value": -3}}),
        ("at least 0", {"name": "bits per byte", "unit": "bits", "entry": {"value": -1}}),
        ("at least 0", {"name": "time to first token", "unit": "s", "entry": {"value": -1}}),
        ("at least 0", {"name": "loss", "unit": "nats per token", "entry": {"value": -1}}),
        ("at least 0", {"difference": difference(-1.2, kind="ratio of speeds")}),
        ("above 0", {"name": "prefill", "unit": "tokens/s", "entry": {"value": 0.0}}),
        ("from 0 to 1", {"name": "accuracy", "unit": "", "entry": {"value": 1.5}}),
        ("from 0 to 1", {"name": "accuracy, normalized", "unit": "", "entry": {"value": -0.5}}),
        ("from 0 to 1", {"name": "acc_norm (3 shots)", "unit": "", "entry": {"value": 50.0}}),
        ("from 0 to 1", {"name": "exact_match (strict)", "unit": "", "entry": {"value": 1.5}}),
        ("from 0 to 1", {"difference": difference(0.0, p_value=7)}),
        ("'difference' or 'ratio of speeds'", {"difference": difference(0.0, kind="x")}),
        ("cannot be shown", {"entry": 5}),
        ("cannot be shown", {"entry": {"value": 10**400}}),
    ):
        line = refused(quantity_with(**changes))
        assert rule in line, (changes, line)
    with pytest.raises(ValueError, match="cannot be shown"):
        card_text(world / "rigpt", results=refused.place)


def test_numbers_that_contradict_each_other_are_refused(refused):
    two = {"entry": {"value": 4.711}, "baseline": {"value": 4.836}, "name": "loss", "unit": "nats per token"}
    assert not refused(quantity_with(**two, difference=difference(-0.125, -0.2, -0.1, p_value=0.01, significant=True)))
    for value in (-3.0, 3.0, 0.125, None):
        assert "two values, -0.125" in refused(quantity_with(**two, difference=difference(value)))
    untested = difference(-0.125, -0.2, 0.1, p_value=0.9, significant=True)
    assert "must be False by the p-values" in refused(quantity_with(**two, difference=untested))
    shown = difference(-0.125, p_value=0.001)
    assert "must be True by the p-values" in refused(quantity_with(**two, difference=shown))

    def perplexity(results: dict[str, Any]) -> dict[str, Any]:
        return results["tasks"][0]["models"]["model"]

    def both(key: str, name: str, value: float) -> Callable[[dict[str, Any]], None]:
        def change(results: dict[str, Any]) -> None:
            (quantity,) = (own for own in results["tasks"][0]["quantities"] if own["name"] == name)
            perplexity(results)[key] = value
            quantity["models"]["model"] = {"value": value}
            quantity.pop("difference", None)

        return change

    for key, name in (
        ("perplexity", "perplexity"),
        ("word_perplexity", "word perplexity"),
        ("bits_per_byte", "bits per byte"),
    ):
        assert "must be what the loss beside it gives" in refused(both(key, name, 2.5))

    def table_only(results: dict[str, Any]) -> None:
        entry = results["tasks"][0]["quantities"][0]["models"]["model"]
        entry["value"] = entry["low"]

    assert "in the task's own record" in refused(table_only)
    assert "the loss beside it" in refused(lambda results: perplexity(results).update(byte_perplexity=3.0))


def test_gauge_errors_that_contradict_each_other_are_refused(refused):
    assert not refused(largest_error(0.0)) and not refused(largest_error(2e-15, 1e-15))
    assert not refused(largest_error(None, None)) and not refused(largest_error(1e-15, None))
    for rule, change in (
        (FINITE, largest_error(math.inf)),
        (FINITE, largest_error(1.0, "x")),
        ("at least 0", largest_error(-1e-9)),
        ("at least the mean, 0.002", largest_error(1e-30, 2e-3)),
        ("at least the mean, 0.002", largest_error(None, 2e-3)),
        (
            "the largest of all frames",
            lambda results: results["tasks"][1]["models"]["model"]["largest"].update(float32=1),
        ),
    ):
        assert rule in refused(change), rule


def test_counts_models_and_tasks_that_cannot_be_are_refused(refused):
    def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
        return lambda results: results["models"]["model"].update(changes)

    def measured(**changes: Any) -> Callable[[dict[str, Any]], None]:
        return lambda results: results["tasks"][1]["models"]["model"]["protocol"].update(changes)

    def text(documents: Any) -> Callable[[dict[str, Any]], None]:
        return lambda results: results["suite"]["text"].update(documents=documents)

    for rule, change in (
        (COUNT, entry(parameters=-4)),
        (COUNT, lambda results: results["models"]["baseline"].update(parameters="many")),
        (COUNT, text(-5)),
        (COUNT, text("<script>alert(1)</script>")),
        (COUNT, text(True)),
        (COUNT, lambda results: results["hardware"].update(threads=0)),
        (COUNT, measured(draws=-3)),
        (COUNT, measured(tokens=[0, 0])),
        (COUNT, measured(tokens=[])),
        ("above 0 and at most 1", lambda results: results["suite"].update(fraction=-1)),
        ("as of the model", entry(parameters=7_000_000_000)),
        ("as of the model", entry(type="llama")),
        ("as of the model", entry(dtype="float64")),
        ("baseline, the second of the models", lambda results: results.update(baseline="model")),
        ("baseline, the second of the models", lambda results: results.update(baseline=None)),
        ("there once", lambda results: results["tasks"].append(results["tasks"][0])),
        ("there once", lambda results: results["tasks"][0]["quantities"].append(results["tasks"][0]["quantities"][0])),
    ):
        line = refused(change)
        assert rule in line, (rule, line)


@pytest.mark.parametrize("name", ["rigpt", "smollm2", "converted"])
def test_numbers_that_were_measured_are_taken(name):
    """All measures, two models with differences, and ratios of speeds."""
    path = RECORDED / f"evaluate_{name}.json"
    results = json.loads(path.read_text())
    model, own = next(iter(results["models"].items()))
    check_numbers(path, results, model, {key: own[key] for key in ("type", "parameters", "dtype")})
    assert any("difference" in quantity for task in results["tasks"] for quantity in task["quantities"])
