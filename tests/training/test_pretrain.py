"""Pretraining: one process or many, killed or not, the same numbers; signals, presets and the command line."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.model_cards.runs import training_metadata
from rigpt_hf.training import loop
from rigpt_hf.training.build import build_model
from rigpt_hf.training.data import TokenShards, Windows, window_index
from rigpt_hf.training.diagnostics import excess_kurtosis, flops_per_token
from rigpt_hf.training.kinds import KINDS
from rigpt_hf.training.options import (
    NOT_DECISIVE,
    PRESETS,
    OptimizerOptions,
    PretrainOptions,
    parse_options,
)
from rigpt_hf.training.pretrain import main
from rigpt_hf.training.schedule import make_schedule
from rigpt_hf.training.state import load_state
from tests.processes import ROOT, run
from tests.tolerances import DISTRIBUTED, SYMMETRY
from tests.training.runs import (
    CALM,
    PEAK,
    interrupted,
    launch,
    log_of,
    make_options,
    numbers_of,
    pretrain,
    same_run,
)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("kills, steps", [(4, 28), pytest.param(10, 60, marks=pytest.mark.full)])
def test_a_killed_run_has_the_numbers_of_one_that_was_not(data, tmp_path, world, kills, steps):
    """With dropout, whose random numbers are kept with each checkpoint."""
    launch(data, tmp_path / "straight", world, max_steps=steps)
    killed = launch(data, tmp_path / "killed", world, kills=kills, max_steps=steps)["killed_at"]
    assert len(killed) == kills and len(set(killed)) >= min(kills - 2, 5) and max(killed) < steps, killed
    straight = numbers_of(tmp_path / "straight")
    assert len(straight) == steps and straight[0]["loss"] - straight[-1]["loss"] > 1.0
    assert straight == numbers_of(tmp_path / "killed") and same_run(tmp_path / "straight", tmp_path / "killed")
    launch(data, tmp_path / "seed", world, max_steps=6, seed=1)
    assert len(other := numbers_of(tmp_path / "seed")) == 6 and other != straight[:6]


def program(data: Path, folder: Path, launcher: bool) -> None:
    """The program itself in two processes, with the run of `plain` in a file of YAML, to `folder / "two"`."""
    options = CALM | {"data_dir": str(data), "data": None, "context_length": 16, "learning_rate": 0.01}
    options |= {"max_steps": 12, "global_batch_size": 4, "eval_steps": 6, "eval_batches": 2, "save_steps": 3}
    (folder / "run.yaml").write_text(json.dumps(options | {"warmup_steps": 3}))
    words = [ROOT / "training" / "pretrain.py", "--config", folder / "run.yaml", "--deterministic"]
    words += ["--output-dir", folder / "two"]
    if launcher:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    done = run(*words, world=1 if launcher else 2, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("12 steps, validation loss") == 1, "one process speaks for both"
    assert list((folder / "two").rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("fsdp2", "launcher"))]
)
def test_two_processes_give_the_curve_of_one(data, plain, tmp_path, kind):
    options = CALM | {"fsdp": kind == "fsdp2"}
    if kind == "fsdp2":
        launch(data, tmp_path / "two", 2, **options)
    else:
        program(data, tmp_path, launcher=kind == "launcher")
    one, two = numbers_of(plain), numbers_of(tmp_path / "two")
    assert one[0]["loss"] - one[-1]["loss"] > 0.4, "nothing was learned"

    def assert_same_curve(ours: list[dict]) -> None:
        for a, b in zip(one, ours, strict=True):
            assert abs(a["loss"] - b["loss"]) <= DISTRIBUTED
            assert abs(a["gradient_norm"] - b["gradient_norm"]) <= 10 * DISTRIBUTED
            assert abs(a.get("validation_loss", 0) - b.get("validation_loss", 0)) <= DISTRIBUTED

    assert_same_curve(two)
    assert "kurtosis" in two[-1]
    states = [load_state(path) for path in (tmp_path / "two" / "checkpoints" / "step-00000012").glob("rng-*")]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"]), "dropout would be the same"
    # One process goes on where two were, and two where one was.
    pretrain(data, interrupted(tmp_path / "two", tmp_path / "alone"), **CALM)
    launch(data, interrupted(plain, tmp_path / "joined"), 2, **options)
    for name, before in (("alone", two), ("joined", one)):
        moved = numbers_of(tmp_path / name)
        assert moved[:9] == before[:9] and moved[9:] != before[9:], "the last steps are done again by others"
        assert_same_curve(moved)


def test_what_a_run_leaves(data, straight, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    assert isinstance(model, RiGPTForCausalLM) and model.config.use_cache
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)
    assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = log_of(straight)
    assert log[0]["mfu"] == log[0]["tokens_per_second"] * flops_per_token(model, 16) / PEAK
    assert [entry["step"] for entry in log] == list(range(1, 13))
    validated = [entry["step"] for entry in log if "validation_loss" in entry]
    assert validated == [3, 6, 9, 12], "what may be kept as the best is judged"
    assert all(len(log[step]["kurtosis"]) == 3 and 1e-5 < log[step]["update_norm"] < 1 for step in (5, 11))
    assert log[-1]["invariance_error"] <= SYMMETRY[torch.float32]
    assert training_metadata(straight / "model").steps == 12 and log_of(straight / "model") == log
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept[-2:] == ["step-00000009", "step-00000012"] and len(kept) <= 3
    # The same command again has nothing left to do, and harms nothing.
    shutil.copytree(straight, tmp_path / "again")
    again = pretrain(data, tmp_path / "again", diagnose_steps=6)
    assert again.started == 12 and again.losses == [] and log_of(tmp_path / "again") == log
    assert again.model_folder == tmp_path / "again" / "model"


def test_a_record_stays_that_of_the_model_until_there_is_another(data, tmp_path):
    """A run that goes on with other options and is stopped has told nothing of the weights that are there."""
    short = {"max_steps": 2, "warmup_steps": 1, "save_steps": 2, "allow_changes": True}
    pretrain(data, tmp_path, **short)
    before = training_metadata(tmp_path / "model")
    run = loop.PretrainingRun(make_options(data, tmp_path, **short | {"max_steps": 40, "learning_rate": 0.5}), False)
    advance = run._advance

    def stopped():
        run.requests.received = run.step == 3
        return advance()

    run._advance = stopped
    assert run.train().steps == 4 and log_of(tmp_path)[-1]["step"] == 4
    assert training_metadata(tmp_path / "model") == before and (before.steps, before.learning_rate) == (2, 0.01)
    assert json.loads((tmp_path / "run.json").read_text())["learning_rate"] == 0.5
    pretrain(data, tmp_path, **short | {"max_steps": 5})
    assert training_metadata(tmp_path / "model").steps == 5


def test_stock_gpt2_trains_too(data, tmp_path):
    options = {"model_kind": "stock-gpt2", "config_overrides": {"n_embd": 16, "n_layer": 1, "n_head": 2}}
    report = pretrain(data, tmp_path, **options, optim="adamw")
    assert isinstance(AutoModelForCausalLM.from_pretrained(report.model_folder), GPT2LMHeadModel)
    assert report.losses[-1] < report.losses[0] - 0.2
    going_on = {"model_kind": "rigpt", "init_from": str(report.model_folder), "config_overrides": {}}
    with pytest.raises(ValueError, match="`model_kind` must be that of `init_from`, got 'rigpt'.*a gpt2"):
        pretrain(data, tmp_path / "kind", **going_on)
    going_on["model_kind"] = "stock-gpt2"
    more = pretrain(data, tmp_path / "more", **going_on, optim="adamw", max_steps=8)
    assert more.losses[0] < report.losses[0] - 0.2


def test_a_preset_of_a_rigpt_gives_a_stock_model_its_sizes(data, tmp_path, capsys):
    way = "--model-kind stock-gpt2 --optim adamw --max-steps 2 --warmup-steps 1 --report-to none --context-length 16"
    words = [*way.split(), "--data-dir", str(data), "--data", "null", "--eval-batches", "1"]

    def made(name: str, *more: str) -> Any:
        assert main([*words, "--config", name, *more, "--output-dir", str(tmp_path / name)]) == 0, capsys.readouterr()
        return AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").config

    config = made("smoke", "--config-overrides", "n_layer=1,intermediate_size=96")
    assert (config.n_embd, config.n_head, config.n_layer, config.n_inner) == (64, 4, 1, 96)
    left = "and none of embedding_size, qk_norm, hidden_act, which only a RiGPT has."
    assert config.activation_function == "gelu_new" and left in " ".join(capsys.readouterr().out.split())
    # The rates of a preset for an optimizer that has none can be emptied, as the message says.
    assert main([*words, "--config", "tiny-docs", "--output-dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.rstrip().endswith("Pass --lr-multipliers {}.")
    assert made("tiny-docs", "--lr-multipliers", "{}", "--config-overrides", "hidden_size=12").n_embd == 12
    # What no class has is refused all the same, and what is left out of one is not left out of a RiGPT.
    assert main([*words, "--config-overrides", "colour=1,qk_norm=true"]) == 2
    assert "`--config-overrides` must hold fields of GPT2Config, got colour." in capsys.readouterr().err
    assert KINDS["rigpt"].fields({"qk_norm": True, "colour": 1}) == ({"qk_norm": True, "colour": 1}, [])


def at_step(step: int, act):
    """For `monkeypatch`: `PretrainingRun._advance` that does something first, once so many steps are done."""
    advance = loop.PretrainingRun._advance

    def watched(run):
        if run.step == step:
            act(run)
        return advance(run)

    return loop.PretrainingRun, "_advance", watched


def test_a_signal_and_what_is_no_number_spoil_nothing(data, straight, tmp_path, monkeypatch):
    """A signal in the fifth step, a loss and a gradient in the eighth, and still the same numbers in the end."""
    clip = torch.nn.utils.clip_grad_norm_

    def poison(run):
        with torch.no_grad():
            next(run.model.parameters()).fill_(float("nan"))

    def clip_poisoned(parameters, limit):
        parameters = list(parameters)
        parameters[0].grad[0] = float("inf")
        return clip(parameters, limit)

    with monkeypatch.context() as patched:
        patched.setattr(*at_step(4, lambda run: os.kill(os.getpid(), signal.SIGTERM)))
        report = pretrain(data, tmp_path)
    assert report.steps == 5 and report.model_folder is None
    for act, message in (
        (poison, "The loss is nan in step 8.*are untouched.*lower --learning-rate"),
        (
            lambda run: patched.setattr(torch.nn.utils, "clip_grad_norm_", clip_poisoned),
            "The norm of the gradient is inf in step 8.*are untouched",
        ),
    ):
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=message):
            patched.setattr(*at_step(7, act))
            pretrain(data, tmp_path)
    again = pretrain(data, tmp_path)
    assert again.started == 6 and same_run(tmp_path, straight)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both(data, tmp_path):
    """In the middle of the fourth step, when both have agreed already to do it."""
    launch(data, tmp_path / "run", 2, **CALM, signalled=[0, 4])
    assert len(log_of(tmp_path / "run")) == 5
    launch(data, tmp_path / "run", 2, **CALM)
    launch(data, tmp_path / "straight", 2, **CALM)
    assert same_run(tmp_path / "run", tmp_path / "straight")


def test_another_optimizer_starts_with_fresh_moments(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for steps, optim in ((18, "adamw"), (24, "equivariant")):
        report = pretrain(data, tmp_path / "run", optim=optim, max_steps=steps, allow_changes=True)
        assert report.started == steps - 6 and report.losses[-1] < report.losses[0]


def test_another_batch_size_goes_on_with_the_next_windows(data, tmp_path, monkeypatch):
    seen, take, short = [], Windows.take, {"warmup_steps": 1, "save_best_limit": 0}
    monkeypatch.setattr(Windows, "take", lambda self, windows: seen.append(windows.tolist()) or take(self, windows))
    pretrain(data, tmp_path, **short, max_steps=3)
    first = seen[-3:]
    pretrain(data, tmp_path, **short, max_steps=6, global_batch_size=2, allow_changes=True)
    split = Windows(TokenShards(data), 16, 0)
    # Windows of validation are taken through another object, before all others.
    assert list(itertools.chain(*first, *seen[-3:])) == window_index(np.arange(12 + 6), len(split), 0).tolist()


def parameters(options) -> int:
    """How many the model has, which is not made."""
    size = options.tokenizer.removeprefix("train:")
    with torch.device("meta"):
        model = build_model(options, int(size) if size.isdigit() else 50257, options.context_length, 0, 0)
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_preset_is_whole():
    presets = {path.stem: parse_options(["--config", str(path)]) for path in PRESETS.glob("*.yaml")}
    counts = {name: parameters(options) for name, options in presets.items()}
    twins = 0
    for name, options in presets.items():
        text = (PRESETS / f"{name}.yaml").read_text()
        assert f"training/presets/{name}.yaml" in text, "the line that starts it"
        million = options.max_steps * options.global_batch_size * options.context_length / 1e6
        sizes = (f"{million:.1f} million tokens", f"{million * 1e3:.0f} thousand", f"{million / 1e3:.1f} billion")
        assert any(words in text for words in sizes), f"the arithmetic of the batch: {million} million tokens"
        assert options.output_dir == f"runs/{name}"
        count = counts[name] / 1e6
        assert "parameters" not in text or any(f" {count:.{n}f} million parameters" in text for n in (1, 2)), count
        if size := name.partition("stock-gpt2-")[2]:
            twin = size if size in presets else f"gpt2-{size}"
            for field in ("data", "data_options", "max_steps", "global_batch_size"):
                assert getattr(options, field) == getattr(presets[twin], field)
            assert abs(counts[name] / counts[twin] - 1) <= 0.01
            options.config_overrides["n_embd"] -= 2 * options.config_overrides["n_head"]
            assert abs(parameters(options) / counts[twin] - 1) > 0.01, "another width would be found"
            twins += 1
    assert len(presets) >= 7 and twins >= 3


def test_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--learning-rate" in shown and "Peak learning rate" in shown and "smoke" in shown
    for wrong in ("--max-stepz 7", "--optim sgd", "--max-steps many", "--config none.yaml"):
        assert main(wrong.split()) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("pretrain.py: ") and shown.count("\n") == 1 and "--help" in shown, shown
    assert main(["--data-dir", str(tmp_path / "none"), "--data", "null", "--output-dir", str(tmp_path)]) == 2
    assert "pretrain.py: `--data-dir` must be a folder of tokenised shards" in capsys.readouterr().err


def test_every_run_option_is_decisive_or_listed():
    decisive = set(PretrainOptions().facts())
    assert decisive >= {"max_steps", "global_batch_size", "seed", "mixed_precision", "context_length", "learning_rate"}
    assert set(NOT_DECISIVE) == set(PretrainOptions.__dataclass_fields__) - decisive


def test_schedules():
    linear = make_schedule(OptimizerOptions(warmup_steps=4, decay_fraction=0.5, min_lr_rate=0.1), 20)
    rates = [linear(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[9] == 1.0
    assert rates[19] == pytest.approx(0.1) and all(a > b for a, b in itertools.pairwise(rates[9:]))
    cosine = make_schedule(
        OptimizerOptions(warmup_steps=0, decay_fraction=1.0, min_lr_rate=0.0, lr_scheduler_type="cosine"), 10
    )
    assert cosine(9) == pytest.approx(0.0) and cosine(4) == pytest.approx(0.5)
    assert make_schedule(OptimizerOptions(warmup_steps=0, lr_scheduler_type="constant"), 10)(9) == 1.0


def test_kurtosis_and_operations(data, tmp_path):
    draw = torch.Generator().manual_seed(0)
    gauss = torch.randn(4, 200_000, generator=draw, dtype=torch.float64)
    assert excess_kurtosis(gauss).abs().max() < 0.05
    one = torch.zeros(100, dtype=torch.float64)
    one[3] = 1.0
    assert excess_kurtosis(one) > 90
    assert excess_kurtosis(torch.tensor([1.0, -1.0] * 8)) == pytest.approx(-2.0)
    run = loop.PretrainingRun(make_options(data, tmp_path), progress=False)
    matrices = sum(p.numel() for p in run.plain.parameters() if p.dim() == 2)
    assert flops_per_token(run.plain, 16) == 6 * matrices + 12 * 2 * 16 * 16


def test_before_it_trains_a_run_says_what_on_what_and_where_to(data, tmp_path, capsys):
    model = loop.PretrainingRun(make_options(data, tmp_path / "run", max_steps=5)).plain
    trained = f"A rigpt of {model.num_parameters():,} parameters, from random weights, on 20,000 tokens of {data}\n"
    for steps, after in ((5, ""), (7, ", going on after step 5")):
        options = make_options(data, tmp_path / "run", max_steps=steps, allow_changes=True)
        loop.PretrainingRun(options).train()
        said = capsys.readouterr()
        assert said.out == f"{trained}{steps} steps of 4 windows of 16 tokens{after}; written to {tmp_path / 'run'}\n"
        assert "Pretraining" in said.err
