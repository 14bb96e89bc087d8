"""Steps in turns: what is timed, and what is made of it."""

import json

import torch

from evaluation.experiments import candidates, step_time
from rigpt_hf.evaluation import timing
from tests.evaluation.experiments.runs import SMALL_CANDIDATES
from tests.tolerances import SYMMETRY


def test_recipes_take_turns_and_the_first_turn_is_not_counted(monkeypatch, tmp_path, capsys):
    now, order = [0.0], []
    cost = {"stock-gpt2": 4.0, "rigpt": 1.0}

    def step_of(name, rows, mixed):
        assert sum(len(each) for each in rows) == step_time.BATCH and mixed

        def step():
            now[0] += cost[name] * (100.0 if order.count(name) == 0 else 1.0)
            order.append(name)

        return step

    monkeypatch.setattr(step_time, "step_of", step_of)
    monkeypatch.setattr(timing, "timer", lambda: now[0])
    words = ["--only", "stock-gpt2,rigpt", "--turns", "3", "--output", str(tmp_path / "a" / "times.json")]
    assert step_time.main(words) == 0
    # Another one is first in every turn.
    assert order == ["rigpt", "stock-gpt2", "stock-gpt2", "rigpt"] * 2
    facts = json.loads((tmp_path / "a" / "times.json").read_text())
    assert facts["seconds"] == {"stock-gpt2": [4.0] * 3, "rigpt": [1.0] * 3}
    assert facts["ratios"] == {"stock-gpt2": [1.0] * 3, "rigpt": [0.25] * 3}
    assert "0.25 (0.25 to 0.25)" in capsys.readouterr().out


def test_a_step_trains(monkeypatch, capsys):
    for name, candidate in SMALL_CANDIDATES.items():
        monkeypatch.setitem(candidates.CANDIDATES, name, candidate)
    monkeypatch.setattr(step_time, "BATCH", 2)
    monkeypatch.setattr(step_time, "CONTEXT", 8)
    made, original = [], step_time.build_model

    def build(*given):
        made.append((given, original(*given)))
        return made[-1][1]

    monkeypatch.setattr(step_time, "build_model", build)
    kept = "rigpt" + step_time.SYMMETRIC
    seconds = step_time.measure(["rigpt", "stock-gpt2", kept], 2, mixed=True)
    assert all(len(turns) == 2 and min(turns) > 0 for turns in seconds.values()) and len(made) == 3
    symmetry = step_time.TokenSymmetry.named("symmetric", [range(1, 5), range(5, 9)], step_time.VOCABULARY)
    representation = step_time.Representation.choose(made[2][1].config, symmetry)
    assert representation.distance(made[2][1]) < SYMMETRY[torch.float32] < 0.1 < representation.distance(made[0][1])
    for given, model in made:
        pairs = zip(model.parameters(), original(*given).parameters(), strict=True)
        assert any(bool((after != before).any()) for after, before in pairs)
    for arguments, message in (
        (["--only", "nobody"], "`--only` must name some of"),
        (["--only", "rigpt", "--precision", "fp8"], "--precision"),
        (["--turns", "1"], "`--turns` must be at least 2"),
        (["--symmetry"], "`--symmetry` needs a RiGPT as the first of `--only`, got 'stock-gpt2'"),
    ):
        assert step_time.main(arguments) == 2 and message in capsys.readouterr().err


def test_ratios_have_intervals_of_their_logarithms():
    # Twice and half: the mean is 1, and with one degree of freedom Student's factor is 12.7062.
    assert step_time.geometric([2.0, 0.5]) == "1.00 (0.00 to 6682.65)"
    assert step_time.geometric([2.0, 2.0, 2.0]) == "2.00 (2.00 to 2.00)"
