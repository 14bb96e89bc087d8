"""Steps in turns: what is timed, and what is made of it."""

import json

from evaluation.experiments import candidates, step_time
from rigpt_hf.evaluation import timing
from rigpt_hf.training.options import ModelOptions, OptimizerOptions


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 257}
STOCK = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 257}


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
    for name, candidate in (
        ("rigpt", candidates.Candidate(ModelOptions(config_overrides=TINY), OptimizerOptions(), (0.01,))),
        ("stock-gpt2", candidates.Candidate(ModelOptions("stock-gpt2", STOCK), OptimizerOptions(optim="adamw"), (1,))),
    ):
        monkeypatch.setitem(candidates.CANDIDATES, name, candidate)
    monkeypatch.setattr(step_time, "BATCH", 2)
    monkeypatch.setattr(step_time, "CONTEXT", 8)
    made = []
    original = step_time.build_model
    monkeypatch.setattr(step_time, "build_model", lambda *given: made.append(original(*given)) or made[-1])
    seconds = step_time.measure(["rigpt", "stock-gpt2"], 2, mixed=True)
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    for model in made:
        before = original(
            ModelOptions("stock-gpt2", STOCK) if "transformer" in dir(model) else ModelOptions(config_overrides=TINY),
            step_time.VOCABULARY,
            8,
            None,
            0,
        )
        moved = [bool((a != b).any()) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
        assert any(moved)
    for arguments, message in (
        (["--only", "nobody"], "`only` must name some of"),
        (["--only", "rigpt", "--precision", "fp8"], "--precision"),
        (["--turns", "1"], "`turns` must be at least 2"),
    ):
        assert step_time.main(arguments) == 2 and message in capsys.readouterr().err


def test_ratios_have_intervals_of_their_logarithms():
    # Twice and half: the mean is 1, and with one degree of freedom Student's factor is 12.7062.
    assert step_time.geometric([2.0, 0.5]) == "1.00 (0.00 to 6682.65)"
    assert step_time.geometric([2.0, 2.0, 2.0]) == "2.00 (2.00 to 2.00)"
