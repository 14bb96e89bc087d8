"""What the tools cost: every verb works on a small model, and what grows faster than the model is marked."""

import json

import pytest

from evaluation.experiments import tool_costs


@pytest.fixture
def small(monkeypatch):
    for name, width in (("42M", 16), ("135M", 24)):
        shape = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        monkeypatch.setitem(tool_costs.SIZES, name, shape | {"vocab_size": 64})


def test_a_verb_is_measured_in_a_process_of_its_own(small, tmp_path):
    options = ["--sizes", "42M", "--tools", "convert", "--output", str(tmp_path / "costs.json")]
    assert tool_costs.main(options) == 0
    result = json.loads((tmp_path / "costs.json").read_text())
    cost = result["sizes"]["42M"]["tools"]["convert"]
    assert 0 < cost["seconds"] < 60 and 0 < cost["bytes"] < cost["bytes of imports"] and not result["powers"]


@pytest.mark.full
def test_all_tools(small, tmp_path):
    assert tool_costs.main(["--sizes", "42M,135M", "--output", str(tmp_path / "costs.json")]) == 0
    assert set(json.loads((tmp_path / "costs.json").read_text())["powers"]) == set(tool_costs.TOOLS)


def test_a_tool_that_fails_is_named(small, capsys, monkeypatch):
    monkeypatch.setattr(tool_costs, "CHILD", "import sys; sys.exit('no such folder')")
    assert tool_costs.main(["--sizes", "42M", "--tools", "rotate"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "`--tools` must be ones that succeed, got rotate, which ended with" in said


def test_powers():
    def costs(power):
        return {
            size: {"parameters": n, "tools": {"diff": {"seconds": n**power, "bytes": 3.0 * n}}}
            for size, n in (("42M", 4e7), ("360M", 4e8))
        }

    for power, marked in ((1.0, False), (2.0, True)):
        found = tool_costs.powers(costs(power))
        assert found["diff"] == pytest.approx({"seconds": power, "bytes": 1.0})
        cells = list(tool_costs.table_of(costs(power), found).columns[-1].cells)
        assert ("[red]" in cells[0]) is marked
