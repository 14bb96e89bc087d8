"""The plan of a step on shards: what is planned shrinks with the number of GPUs, and is what processes do."""

import json
from pathlib import Path

import pytest

from evaluation.experiments import sharding_plan


RESULT = Path(sharding_plan.__file__).parents[1] / "results" / "sharding_plan.json"
SHAPE = sharding_plan.SMALL | {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 64}


def test_what_is_held_shrinks_with_the_number_of_gpus():
    one, two, eight = (sharding_plan.planned_on(SHAPE, shards, 1) for shards in (1, 2, 8))
    assert one["most"]["sent"] == one["most"]["messages"] == 0
    for name in ("weights", "gradients", "momenta"):
        assert one["most"][name] == 2 * two["most"][name] == 8 * eight["most"][name] > 4 * one["parameters"] * 0.99
    assert 0 < eight["most"]["sent"] < two["most"]["sent"]
    assert two["total"]["sent"] == two["total"]["received"] > 0
    replicated = sharding_plan.planned_on(SHAPE, 2, 4)
    assert replicated["most"]["weights"] == two["most"]["weights"] != eight["most"]["weights"]


def test_the_result_that_is_reported():
    """The plan is what the formulas give today, and every process measured was as planned."""
    result = json.loads(RESULT.read_text())
    assert result["shape"] == "7b" and [row["shards"] * row["replicas"] for row in result["planned"]] == [8, 64, 64]
    assert result["planned"][0] == sharding_plan.planned_on(sharding_plan.SHAPES["7b"], 8, 1)
    pairs = [pair for row in result["measured"] for pair in row["processes"]]
    assert len(pairs) == 10
    for pair in pairs:
        assert pair["planned"] == pair["measured"] and pair["measured"]["transient"] and pair["measured"]["messages"]


@pytest.mark.full
@pytest.mark.slow
def test_the_program_measures_what_it_planned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharding_plan, "MEASURED", ((2, 1),))
    monkeypatch.setitem(sharding_plan.SHAPES, "124m", SHAPE)
    output = tmp_path / "plan.json"
    assert not sharding_plan.main(["--shape", "124m", "--gpus", "2,16", "--output", str(output)])
    assert "Measured as planned, to the byte: 2 of 2 processes." in capsys.readouterr().out
    planned = json.loads(output.read_text())["planned"]
    assert [(row["replicas"], row["shards"]) for row in planned] == [(1, 2), (1, 16), (2, 8)]
