"""The script for a GPU, on a CPU at toy size: all parts give figures, and a second call goes on."""

import json

import pytest
import torch

from evaluation.experiments import gpu


@pytest.fixture
def call(tmp_path, capsys):
    def run(*arguments, name="out.json", code=0):
        arguments = (tmp_path / name, "--device", "cpu", "--shape", "toy", "--turns", 3, *arguments)
        assert gpu.main(list(map(str, arguments))) == code
        said = " ".join(capsys.readouterr().err.split())
        return json.loads((tmp_path / name).read_text())["parts"] if code == 0 else said

    return run


def test_what_was_done_is_not_done_again(call, monkeypatch):
    monkeypatch.setattr(gpu, "LAST", 0.01)
    done = []
    for name in ("speed", "tools"):
        monkeypatch.setitem(gpu.PARTS, name, lambda bench, name=name: done.append(name) or {"figure": len(done)})
    first = call("--parts", "speed,optimizer", "--minutes", 1)
    assert set(first) == {"speed", "optimizer"} and done == ["speed"]
    assert len(first["optimizer"]["ratio of training steps"]) == 3
    second = call("--parts", "speed,tools,training", "--minutes", 0.05)
    assert done == ["speed", "tools"] and first.items() <= second.items()
    training = second["training"]
    assert training["steps"] == len(training["loss"]["rigpt"]) == len(training["loss"]["gpt2"]) > 1
    assert all(2 < loss < 5 for loss in training["validation"].values())  # log 64 is 4.2
    assert "with another rate" in call("--learning-rate", 1e-2, code=2)


def test_no_time_is_said(call):
    parts = call("--minutes", 0)
    assert all("no time was left" in part["not run"] for part in parts.values()) and set(parts) == set(gpu.PARTS)
    assert "figure" not in call("--minutes", 0, "--parts", "tools")["tools"], "what was not run is tried again"


def test_attention_that_is_another_function_does_not_agree(call, monkeypatch):
    real = gpu._logits_and_gradients
    calls = []

    def wrong(model, ids):
        calls.append(model.config._attn_implementation)
        found = real(model, ids)
        return [values * 1.05 for values in found] if calls[-1] == "sdpa" else found

    monkeypatch.setattr(gpu, "BACKENDS", ("eager", "sdpa", "flash_attention_2"))
    found = call("--parts", "backends", name="right.json")["backends"]
    assert found["eager"]["agrees"] and found["sdpa"]["agrees"] and 0 < found["sdpa"]["logits"] < 0.02
    assert "flash" in found["flash_attention_2"]["absent"].lower()
    monkeypatch.setattr(gpu, "_logits_and_gradients", wrong)
    assert not call("--parts", "backends", name="wrong.json")["backends"]["sdpa"]["agrees"]
    assert calls[:3] == ["eager", "eager", "sdpa"]  # the first in float32


def test_the_rule_can_be_learned():
    bench = gpu.Bench(gpu.Options(None, device="cpu", shape="toy"))
    windows, held_out = gpu._windows(bench)
    for ids in (windows, held_out):
        follows = (3 * ids[:, 1:-1] + ids[:, :-2]) % 64
        assert 0.85 < float((follows == ids[:, 2:]).float().mean()) < 0.92
    assert not any(torch.equal(one, other) for one in held_out for other in windows)


def test_models_beside_each_other(call, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # which takes minutes on a CPU
    rows = call("--parts", "speed,tools", "--minutes", 9)
    for what in ("prefill, eager", "cached generation, compiled", "training step, compiled"):
        row = rows["speed"][what]
        assert set(row["tokens_per_second"]) == {"rigpt", "gpt2", "llama"}
        assert all(spread["lower"] <= spread["median"] for spread in row["faster_than"].values())
    assert rows["tools"]["verdict"] == "disguise" and set(rows["tools"]["seconds"]) == {
        "convert",
        "rotate",
        "fingerprint",
        "diff",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "sped"), "`--parts` must name some of backends, speed"),
        (("--learning-rate", 0), "`--learning-rate` must be positive"),
        (("--turns", 2), "`--turns` must be at least 3"),
    ],
)
def test_impossible_options_are_refused(call, arguments, message):
    assert message in call(*arguments, code=2)


def test_a_file_of_others_stays(call, tmp_path):
    (tmp_path / "out.json").write_text('{"mine": 1}')
    assert "must be new or a file of this program" in call(code=2)
    assert (tmp_path / "out.json").read_text() == '{"mine": 1}'
