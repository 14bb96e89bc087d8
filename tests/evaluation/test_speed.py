"""`make bench`: both models are measured in all ways, and what is written says so."""

import json

import pytest

from rigpt_hf.evaluation import speed
from tests.processes import run


@pytest.mark.full
def test_the_peak_of_memory_is_that_of_a_process_of_its_own():
    assert 1e8 < speed.peak_memory("gpt2", "small", "sdpa") < 1e10


def test_every_row_is_measured(monkeypatch, tmp_path):
    tiny = speed.Shape(hidden_size=16, layers=1, heads=2, vocabulary=50, context=64, batch=2, sequence=8)
    monkeypatch.setitem(speed.SHAPES, "tiny", tiny)
    monkeypatch.setattr(speed, "peak_memory", lambda name, *shape: {"gpt2": 3e6, "rigpt": 2e6}[name])
    speed.main(["tiny"], ["eager"], turns=3, output=tmp_path / "speed.json")
    written = json.loads((tmp_path / "speed.json").read_text())
    rows = {row["what"]: row for row in written["rows"]}
    assert list(rows) == [*speed.GOALS, "load time", "peak memory, training"]
    for row in list(rows.values())[:-1]:
        assert row["turns"] == 3 and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        assert row["gpt2"] > 0 and row["rigpt"] > 0
    # A generation is told by the token, and two passes of a tiny model take longer than one step of it.
    assert rows["cached generation"]["gpt2"] < rows["training step"]["gpt2"]
    assert rows["peak memory, training"]["ratio"] == 1.5
    assert 0 < written["share_of_matrix_products"]["tiny"]["rigpt"] < 1


def test_ratios_are_of_the_same_turn():
    row = speed.summarise("s", "eager", "w", {"gpt2": [2.0, 6.0, 30.0], "rigpt": [1.0, 2.0, 15.0]})
    assert (row.gpt2, row.rigpt, row.ratio) == (6.0, 2.0, 2.0) and row.quartiles == pytest.approx((2.0, 3.0))


@pytest.mark.parametrize("arguments", [("--shape", "x"), ("--attention", "x"), ("--output", "."), ("--turns", "1")])
def test_bad_input_ends_in_one_line(arguments, tmp_path):
    done = run("-m", "rigpt_hf.evaluation.speed", *arguments, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("speed.py: ") and list(tmp_path.iterdir()) == []
    assert arguments[0] in line or arguments[1] in line
