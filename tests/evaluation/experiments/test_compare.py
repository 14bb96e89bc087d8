"""The programs that compare and measure training: the same data for all, numbers that mean what they say."""

import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from evaluation.experiments import candidates, compare, equivariance, optimizer_cost
from rigpt_hf.training import diagnostics
from rigpt_hf.training.build import build_model, build_optimizer
from rigpt_hf.training.loop import PretrainingRun
from tests.evaluation.experiments.runs import SMALL_CANDIDATES
from tests.tolerances import TRAINING


@pytest.fixture
def files(tmp_path):
    draw = np.random.default_rng(0)
    paths = []
    for split, size in (("train", 20_000), ("validation", 6_000)):
        jumps = np.where(draw.random(size) < 0.1, draw.integers(0, 61, size), 1)
        paths.append(tmp_path / f"{split}.bin")
        (np.cumsum(jumps) % 61).astype("<u2").tofile(paths[-1])
    return paths


def test_windows_are_those_of_the_protocol():
    tokens = np.arange(5000, dtype="<u2")
    windows = compare.DrawnWindows(tokens, 256, 16, 3, seed=0)
    draw = np.random.default_rng(0)
    for step in range(3):
        starts = draw.integers(0, len(tokens) - 257, 16)
        batch = windows.batch(step, 16)
        assert batch["input_ids"].shape == (16, 257) and torch.equal(batch["labels"], batch["input_ids"])
        assert batch["input_ids"][:, 0].tolist() == starts.tolist()
        shares = [windows.batch(step, 16, rank, 4)["input_ids"] for rank in range(4)]
        assert torch.equal(torch.cat(shares), batch["input_ids"])


def test_tokens_to_reach_a_loss():
    result = {"validation": [(25, 5.0), (50, 4.0), (75, 3.0)], "tokens_per_step": 10}
    assert compare.tokens_to_reach(result, 3.5) == 625
    assert compare.tokens_to_reach(result, 4.0) == 500
    assert compare.tokens_to_reach(result, 6.0) == 250
    assert math.isnan(compare.tokens_to_reach(result, 2.0))


def test_differences_are_those_of_the_same_seeds():
    runs = [{"seed": 0, "final_loss": 3.0}, {"seed": 2, "final_loss": 3.5}]
    others = [{"seed": 2, "final_loss": 3.0}, {"seed": 1, "final_loss": 9.0}]
    assert compare.differences(runs, others) == [0.5]
    assert math.isnan(compare.differences(runs, others[1:])[0])
    assert compare.spread(compare.differences(runs, others[1:]), "{:+.3f}") == "–"


@pytest.mark.full
def test_every_candidate_is_a_model_with_rates_of_its_own():
    sizes = {}
    for name, candidate in candidates.CANDIDATES.items():
        model = build_model(candidate.model, 4096, 256, None, 0)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        assert len(candidate.rates) >= 3
        assert build_optimizer(candidate.optimizer, model).param_groups
    # The same parameters where they are compared: the plain network with stock GPT-2, the recipe with a wider one.
    for name in ("rigpt", "rigpt-adamw", "rigpt-rmsnorm", "rigpt-layernorm"):
        assert abs(sizes[name] / sizes["stock-gpt2"] - 1) <= 0.01, name
    for name in ("recipe", "modern"):
        assert abs(sizes[name] / sizes["stock-gpt2-wide"] - 1) <= 0.01 and sizes[name] <= 6.6e6, name


@pytest.mark.full
def test_a_comparison_from_end_to_end(files, tmp_path, monkeypatch):
    for name, candidate in SMALL_CANDIDATES.items():
        monkeypatch.setitem(compare.CANDIDATES, name, candidate)
    monkeypatch.setattr(compare, "BATCH", 2)
    monkeypatch.setattr(compare, "VALIDATION_BATCHES", 2)
    arguments = dict(
        only=["stock-gpt2", "rigpt"], rates=[0.003, 0.01], seeds=2, steps=6, summary=tmp_path / "summary.json"
    )
    compare.run(compare.Options(*files, tmp_path / "runs", **arguments))
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert set(facts["sweeps"]["rigpt"]) == {"0.003", "0.01"}
    for name in ("rigpt", "stock-gpt2"):
        best = min(facts["sweeps"][name], key=lambda rate: facts["sweeps"][name][rate])
        runs = facts["results"][name]
        assert [run["seed"] for run in runs] == [0, 1] and {f"{run['lr']:g}" for run in runs} == {best}
        assert runs[0]["final_loss"] != runs[1]["final_loss"] and runs[0]["final_loss"] < 8.4
        assert all(len(run["logs"]["loss"]) == 6 and run["precision"] == "no" for run in runs)
        (other,) = facts["other_rates"][name]
        assert f"{other['lr']:g}" != best and len(other["logs"]["loss"]) == 6
    assert (tmp_path / "runs" / "losses.png").exists()
    # Runs that are done can be reported alone.
    reported = arguments | {"finished": True, "summary": tmp_path / "again.json", "figure": tmp_path / "curves.png"}
    compare.run(compare.Options(*files, tmp_path / "runs", **reported))
    assert json.loads((tmp_path / "again.json").read_text()) == facts
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="`finished` needs runs that are done"):
        compare.run(compare.Options(*files, tmp_path / "nothing", **reported))
    # What is done is not done again.
    monkeypatch.setattr(compare, "PretrainingRun", None)
    compare.run(compare.Options(*files, tmp_path / "runs", **arguments))
    assert json.loads((tmp_path / "summary.json").read_text()) == facts


@pytest.mark.full
def test_a_comparison_that_was_stopped_goes_on_and_has_its_whole_curve(files, tmp_path, monkeypatch):
    """Stopped in the middle, and once more after the training and before its result is written."""
    monkeypatch.setitem(compare.CANDIDATES, "rigpt", SMALL_CANDIDATES["rigpt"])
    monkeypatch.setattr(compare, "BATCH", 2)
    monkeypatch.setattr(compare, "VALIDATION_BATCHES", 2)
    save, measure = PretrainingRun._log, compare.kurtosis_in_random_frames

    def stop(run, entry, bar):
        save(run, entry, bar)
        if entry["step"] == 26:
            run.requests._note(signal.SIGINT, None)

    def fail(*_):
        raise RuntimeError

    def compared(output, *tokens):
        arguments = {"only": ["rigpt"], "rates": [0.003], "seeds": 1, "steps": 30}
        compare.run(compare.Options(*(tokens or files), tmp_path / output, **arguments))
        return json.loads((tmp_path / output / "rigpt/lr-0.003-seed-0/result.json").read_text())["runs"][0]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PretrainingRun, "_log", stop)
        compared("stopped")
    other = tmp_path / "other.bin"
    other.write_bytes(files[0].read_bytes()[2:])
    with pytest.raises(ValueError, match="must be as when it was started, but changed: data_hashes"):
        compared("stopped", other, files[1])
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(compare, "kurtosis_in_random_frames", fail)
        compared("stopped")
    monkeypatch.setattr(compare, "kurtosis_in_random_frames", measure)
    stopped, whole = compared("stopped"), compared("whole")
    assert [step for step, _ in whole["validation"]] == [25, 30]
    for name in ("validation", "final_loss", "logs"):
        assert stopped[name] == whole[name], name


def test_runs_of_other_options_are_not_reported(files, tmp_path, monkeypatch, refused):
    """As of other steps or tokens, or edited ones; neither when they are gone on with nor when they are reported."""
    losses = {0.003: math.nan, 0.01: 2.0, 0.03: 3.0}

    def train(options, settings, folder, name, rate, seed):
        made = {"steps": options.steps, "tokens_per_step": 10, "parameters": 5, "kurtosis": [0.0], "logs": {}}
        return made | {"final_loss": losses[rate], "validation": [[0, 4.0], [options.steps, losses[rate]]]}

    monkeypatch.setattr(compare, "train", train)
    runs = ["--output", str(tmp_path / "runs"), "--only", "rigpt", "--rates", "0.003,0.01,0.03", "--seeds", "1"]
    given = [*map(str, files), *runs, "--summary", str(tmp_path / "summary.json")]
    for more in ([], ["--finished"]):
        assert compare.main([*given, "--steps", "10", *more]) == 0
        facts = json.loads((tmp_path / "summary.json").read_text())
        assert [run["lr"] for run in facts["results"]["rigpt"]] == [0.01], "one that diverged is not the best"
    monkeypatch.setattr(compare, "train", None)
    other = files[0].with_name("other.bin")
    other.write_bytes(files[0].read_bytes()[2:])
    same = "`--output` must have runs with the same settings, got "
    for more in ([], ["--finished"]):
        for options in ([*given, "--steps", "20"], [*given, "--precision", "bf16", "--steps", "10"]):
            assert same in refused(compare.main, [*options, *more])
        assert same in refused(compare.main, [str(other), *given[1:], "--steps", "10", *more])
    (edited,) = (tmp_path / "runs/rigpt/lr-0.03-seed-0").iterdir()
    for old, new in (("3.0", "1.0"), ("[[0, 4.0], [10, 3.0]]", "[]")):
        text = edited.read_text()
        assert compare.main([*given, "--steps", "10"]) == 0
        edited.write_text(json.dumps(json.loads(text)).replace(old, new))
        assert edited.read_text() != json.dumps(json.loads(text))
        assert "as this program wrote it" in refused(compare.main, [*given, "--steps", "10", "--finished"])
        edited.write_text(text)


def test_impossible_rates_are_refused(files, tmp_path, refused):
    for rates, message in (
        ("abc", "'--rates': 'abc' is not a valid float"),
        ("0.1,", "'--rates': '' is not a valid float"),
        ("0.1,-1", "`--rates` must be positive numbers, separated by commas, got '0.1,-1'"),
        ("nan", "`--rates` must be positive numbers, separated by commas, got 'nan'"),
        ("inf", "`--rates` must be positive numbers, separated by commas, got 'inf'"),
    ):
        answer = refused(compare.main, [*map(str, files), "--output", str(tmp_path / "runs"), "--rates", rates])
        assert message in answer and not (tmp_path / "runs").exists()


def test_impossible_token_files_are_refused(files, tmp_path, refused):
    for which in (0, 1):
        name, least = (("train", 258), ("validation", 4096))[which]
        said = f"`{name.upper()}` must be a file of at least {least} tokens of 2 bytes"
        for content, message in (
            (
                np.zeros(least - 1, "<u2").tobytes(),
                said,
            ),
            (bytes(20_001), said),
            (b"", said),
            (np.full(least, 4096, "<u2").tobytes(), f"`{name.upper()}` must have tokens below 4096, got 4096"),
        ):
            wrong = list(files)
            wrong[which] = tmp_path / "wrong.bin"
            wrong[which].write_bytes(content)
            assert message in refused(compare.main, [*map(str, wrong), "--output", str(tmp_path / "runs")])
            assert not (tmp_path / "runs").exists()
        wrong[which].write_bytes(np.full(least, 4095, "<u2").tobytes())
        compare.check_tokens(wrong[which], name, least)


def test_impossible_measurements_of_equivariance_are_refused(monkeypatch, refused):
    for arguments, message in (
        (["--seeds", "0"], "`--seeds` must be at least 1, got 0"),
        (["--steps", "0"], "`--steps` must be at least 1, got 0"),
        (["--lr", "0"], "`--lr` must be positive, got 0.0"),
        (["--lr", "nan"], "`--lr` must be positive, got nan"),
    ):
        monkeypatch.setattr(equivariance, "pair", None)
        assert message in refused(equivariance.main, arguments)


@pytest.fixture
def refused(capsys):
    """The one line that a program prints about arguments that it does not take."""

    def said(program, arguments: list[str]) -> str:
        capsys.readouterr()
        assert program(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return said


def test_kurtosis_over_all_frames_is_known():
    """Minus 6/(d + 2) for any vectors; and one vector alone is spread more widely than many."""
    one, many = (torch.randn(count, 1, 64, generator=torch.Generator().manual_seed(0)) for count in (1, 64))

    class Stub(torch.nn.Module):
        def forward(self, states, **kwargs):
            return SimpleNamespace(hidden_states=[states])

    found = [diagnostics.kurtosis_in_random_frames(Stub(), {"states": x}, frames=400) for x in (one, many)]
    for each in found:
        assert abs(each["mean"][0] + 6 / 66) <= 4 * each["deviation"][0] / 400**0.5
        assert abs(each["calmest"][0]) < each["deviation"][0] / 10
    assert found[0]["deviation"][0] > 4 * found[1]["deviation"][0]
    axis = torch.nn.functional.one_hot(torch.zeros(1, 1, dtype=torch.int64), 64).float()
    assert diagnostics.stream_kurtosis(Stub(), {"states": axis})[0] > 50


@pytest.mark.full
def test_the_equivariance_that_is_reported():
    with tqdm(disable=True) as bar:
        exact, control = (equivariance.pair(kind, 10, 3e-3, 0, bar) for kind in ("float64", "float64, AdamW"))
    assert exact["distance"] <= TRAINING < 0.1 < control["distance"]
    assert exact["loss"] < 5.6 and exact["loss_difference"] <= TRAINING


def test_the_cost_that_is_reported(refused):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    result = optimizer_cost.measure(shape, 64, 16, 2, turns=2, device=torch.device("cpu"))
    passes, ratios = result["forward and backward"], result["ratio of training steps"]
    assert len(passes) == len(ratios) == 2
    for index, ratio in enumerate(ratios):
        adamw, ours = (passes[index] + result[name][index] for name in ("fused AdamW", "equivariant"))
        assert ratio == pytest.approx(ours / adamw) and ratio > 0
    assert "'--shape': 'huge' is not one of" in refused(optimizer_cost.main, ["--shape", "huge"])
    assert "`--tokens` must be a multiple of 1024 · 2" in refused(optimizer_cost.main, ["--tokens", "1024"])
