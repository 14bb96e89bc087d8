"""Pretraining: one process or many, killed or not, the same numbers; and whatever goes wrong loses nothing."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.training import folder, loop
from rigpt_hf.training.build import build_model, ensure_data
from rigpt_hf.training.data import window_index
from rigpt_hf.training.diagnostics import excess_kurtosis, flops_per_token
from rigpt_hf.training.options import NOT_DECISIVE, DataOptions, OptimizerOptions, RunOptions, parse_options
from rigpt_hf.training.pretrain import main
from rigpt_hf.training.schedule import make_schedule
from rigpt_hf.training.state import load_state
from tests.tolerances import DISTRIBUTED, SYMMETRY
from tests.training.runs import MODEL, log_of, make_options, pretrain


PRESETS = sorted((Path(loop.__file__).parent / "presets").glob("*.yaml"))
CALM = {"config": MODEL | {"residual_dropout": 0.0}}
# What a clock, and not the run, decides.
CLOCKS = ("tokens_per_second", "mfu")


def numbers_of(output: Path) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in CLOCKS} for entry in log_of(output)]


def launch(data: Path, output: Path, world: int = 1, kills: int = 0, **options) -> dict:
    """A run in processes of its own."""
    command = [sys.executable, "-m", "tests.training.runs", str(data), str(output), str(world), str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, cwd=root, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def same_files(a: Path, b: Path) -> bool:
    return (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_has_the_numbers_of_one_that_was_not(data, tmp_path, world):
    """With dropout, whose random numbers are kept with each checkpoint."""
    launch(data, tmp_path / "straight", world, steps=60)
    killed = launch(data, tmp_path / "killed", world, kills=10, steps=60)["killed_at"]
    assert len(killed) == 10 and len(set(killed)) >= 5 and max(killed) < 60, killed
    straight, other = numbers_of(tmp_path / "straight"), numbers_of(tmp_path / "killed")
    assert len(straight) == 60 and straight[0]["loss"] - straight[-1]["loss"] > 1.0
    assert straight == other
    assert same_files(tmp_path / "straight", tmp_path / "killed")
    launch(data, tmp_path / "seed", world, steps=60, seed=1)
    assert numbers_of(tmp_path / "seed") != straight


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_curve_of_one(data, tmp_path, kind):
    pretrain(data, tmp_path / "one", model=CALM)
    launch(data, tmp_path / "two", 2, model=CALM, fsdp=kind == "fsdp2")
    one, two = numbers_of(tmp_path / "one"), numbers_of(tmp_path / "two")
    assert one[0]["loss"] - one[-1]["loss"] > 0.4, "nothing was learned"
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= DISTRIBUTED
        assert abs(a["gradient_norm"] - b["gradient_norm"]) <= 10 * DISTRIBUTED
        assert abs(a.get("validation_loss", 0) - b.get("validation_loss", 0)) <= DISTRIBUTED
    assert "kurtosis" in two[-1]
    # And one process goes on where two were: twice the steps, under a schedule of that length from the start.
    launch(data, tmp_path / "both", 2, model=CALM, fsdp=kind == "fsdp2", steps=18, save_every=18)
    pretrain(data, tmp_path / "alone", model=CALM, steps=18, save_every=9)
    launch(data, tmp_path / "moved", 2, model=CALM, fsdp=kind == "fsdp2", steps=18, save_every=9)
    moved = tmp_path / "moved" / "checkpoints"
    (moved / "step-00000018").rename(tmp_path / "aside")
    pretrain(data, tmp_path / "moved", model=CALM, steps=18, save_every=9)
    for a, b in zip(numbers_of(tmp_path / "alone"), numbers_of(tmp_path / "moved"), strict=True):
        assert abs(a["loss"] - b["loss"]) <= DISTRIBUTED


def test_accumulation_does_not_show(data, tmp_path):
    for micro in (None, 1, 3):
        pretrain(data, tmp_path / str(micro), model=CALM, micro_batch_size=micro)
    for micro in (1, 3):
        for a, b in zip(numbers_of(tmp_path / "None"), numbers_of(tmp_path / str(micro)), strict=True):
            assert abs(a["loss"] - b["loss"]) <= DISTRIBUTED


def test_what_a_run_leaves(data, tmp_path):
    report = pretrain(data, tmp_path / "run", diagnose_every=6)
    assert report.steps == 12 and report.model_folder == tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(report.model_folder)
    assert isinstance(model, RiGPTForCausalLM) and model.config.use_cache
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert [step for step, _ in report.validation] == [3, 6, 9, 12], "what may be kept as the best is judged"
    assert all(len(log[step]["kurtosis"]) == 3 and 1e-5 < log[step]["update_norm"] < 1 for step in (5, 11))
    assert log[-1]["invariance_error"] <= SYMMETRY[torch.float32]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-2:] == ["step-00000009", "step-00000012"] and len(kept) <= 3
    # The same command again has nothing left to do, and harms nothing.
    again = pretrain(data, tmp_path / "run", diagnose_every=6)
    assert again.started == 12 and again.losses == [] and log_of(tmp_path / "run") == log


def test_stock_gpt2_trains_too(data, tmp_path):
    options = {"kind": "stock-gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2}}
    report = pretrain(data, tmp_path, model=options, optimizer={"name": "adamw"})
    assert isinstance(AutoModelForCausalLM.from_pretrained(report.model_folder), GPT2LMHeadModel)
    assert report.losses[-1] < report.losses[0] - 0.2
    going_on = {"kind": "rigpt", "start": str(report.model_folder), "config": {}}
    with pytest.raises(ValueError, match="`model.kind` must be that of `model.start`, got 'rigpt'.*a gpt2"):
        pretrain(data, tmp_path / "kind", model=going_on)
    going_on["kind"] = "stock-gpt2"
    more = pretrain(data, tmp_path / "more", model=going_on, optimizer={"name": "adamw"}, steps=8)
    assert more.losses[0] < report.losses[0] - 0.2


def test_a_signal_ends_a_run_with_a_checkpoint(data, tmp_path, monkeypatch):
    advance = loop.PretrainingRun._advance

    def interrupted(run):
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(run)

    monkeypatch.setattr(loop.PretrainingRun, "_advance", interrupted)
    report = pretrain(data, tmp_path / "run")
    assert report.steps == 5 and report.model_folder is None
    monkeypatch.undo()
    assert pretrain(data, tmp_path / "run").started == 5
    pretrain(data, tmp_path / "straight")
    assert same_files(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both(data, tmp_path):
    """In the middle of the fourth step, when both have agreed already to do it."""
    launch(data, tmp_path / "run", 2, model=CALM, signalled=[0, 4])
    assert len(log_of(tmp_path / "run")) == 5
    launch(data, tmp_path / "run", 2, model=CALM)
    launch(data, tmp_path / "straight", 2, model=CALM)
    assert same_files(tmp_path / "run", tmp_path / "straight")


def test_a_gradient_that_is_no_number_spoils_nothing(data, tmp_path, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    steps = []

    def poisoned(parameters, limit):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == 4:
            parameters[0].grad[0] = float("inf")
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(ValueError, match="The norm of the gradient is inf in step 4.*are untouched"):
        pretrain(data, tmp_path / "run", save_every=1, keep_last=1)
    monkeypatch.undo()
    assert pretrain(data, tmp_path / "run", save_every=1, keep_last=1).started == 3


def test_what_belongs_to_others_stays(data, tmp_path):
    """A folder with something in it, another run's results, and a run that is still going."""
    foreign = tmp_path / "run" / "model"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="`run.output` must be empty or a run's own.*model.*--run.force true"):
        pretrain(data, tmp_path / "run")
    assert (foreign / "thesis.txt").read_text() == "years of work"
    pretrain(data, tmp_path / "run", force=True)
    assert not (foreign / "thesis.txt").exists()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = log_of(tmp_path / "run")
    with pytest.raises(ValueError, match="run.seed.*0.*7.*--run.force true"):
        pretrain(data, tmp_path / "run", seed=7)
    assert log_of(tmp_path / "run") == log
    held = folder.lock(tmp_path / "run")
    with pytest.raises(ValueError, match="`run.output` must be a folder that no other run is in"):
        pretrain(data, tmp_path / "run")
    held.release()
    assert pretrain(data, tmp_path / "run").started == 0


def test_data_made_from_something_else_are_refused(tmp_path):
    text = "\n<|endoftext|>\n".join(f"The number {index} follows the number {index - 1}." for index in range(3000))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(text)
    ours = {"path": str(tmp_path / "data"), "tokenizer": "train:320", "context": 16, "validation": 0.1}

    def prepared(**changes):
        return ensure_data(DataOptions(**(ours | {"source": str(tmp_path / "one.txt")} | changes)), progress=False)

    assert prepared() == prepared() == prepared(source=None)
    for changes, name in (
        ({"source": str(tmp_path / "two.txt")}, "source"),
        ({"tokenizer": "train:400"}, "tokenizer"),
        ({"validation": 0.2}, "validation"),
        ({"max_tokens": 100}, "max_tokens"),
        ({"source_options": {"separator": "\n\n"}}, "source_options.separator"),
    ):
        with pytest.raises(ValueError, match=f"`data.path` must hold what `data.{name}` says"):
            prepared(**changes)


def test_another_optimizer_starts_with_fresh_moments(data, tmp_path):
    for first, second in (("adamw", "equivariant"), ("equivariant", "adamw")):
        output = tmp_path / first
        pretrain(data, output, optimizer={"name": first}, steps=6)
        report = pretrain(data, output, optimizer={"name": second}, steps=12, allow_changes=True)
        assert report.started == 6 and report.losses[-1] < report.losses[0]


def test_another_batch_size_goes_on_with_the_next_windows(data, tmp_path, monkeypatch):
    seen = []
    take = loop.Windows.take
    monkeypatch.setattr(loop.Windows, "take", lambda self, windows: seen.extend(windows) or take(self, windows))
    pretrain(data, tmp_path, steps=6)
    trained = len(seen)
    pretrain(data, tmp_path, steps=12, batch_size=2, allow_changes=True)
    # Validation windows are taken through another object, at the start of each call.
    split = loop.Windows(loop.TokenShards(data), 16, 0)
    expected = window_index(np.arange(24 + 12), len(split), 0).tolist()
    drawn = [int(window) for window in seen]
    assert [*drawn[trained - 24 : trained], *drawn[-12:]] == expected


def test_dropout_differs_between_processes(data, tmp_path):
    launch(data, tmp_path, 2)
    states = [load_state(path) for path in sorted((tmp_path / "checkpoints" / "step-00000012").glob("rng-*"))]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])


def test_corrupted_shards_are_found(data, tmp_path):
    other = make_data_copy(data, tmp_path / "copy")
    shard = other / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[500:900] = bytes(400)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="train-00000.bin"):
        pretrain(other, tmp_path / "new")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoints(data, tmp_path, monkeypatch):
    advance = loop.PretrainingRun._advance

    def poisoned(run):
        if run.step == 4:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))
        return advance(run)

    monkeypatch.setattr(loop.PretrainingRun, "_advance", poisoned)
    with pytest.raises(ValueError, match="The loss is nan in step 5.*are untouched.*lower --optimizer.lr"):
        pretrain(data, tmp_path / "run")
    monkeypatch.undo()
    assert pretrain(data, tmp_path / "run").started == 3
    pretrain(data, tmp_path / "straight")
    assert same_files(tmp_path / "run", tmp_path / "straight")


def test_changed_options_are_named(data, tmp_path):
    pretrain(data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"optimizer.lr.*0.01.*0.02.*--run.allow_changes true"):
        pretrain(data, tmp_path / "run", steps=12, optimizer={"lr": 0.02})
    with pytest.raises(ValueError, match="run.steps"):
        pretrain(data, tmp_path / "run", steps=15)
    with pytest.raises(ValueError, match="`run.steps` must be at least the 12 steps that are done"):
        pretrain(data, tmp_path / "run", steps=9, allow_changes=True)
    report = pretrain(data, tmp_path / "run", steps=15, allow_changes=True)
    assert report.started == 12 and report.steps == 15


def test_damage_is_named(data, tmp_path):
    pretrain(data, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-00000012" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step-00000012.*model.safetensors.*step-00000009"):
        pretrain(data, tmp_path / "run")
    other = make_data_copy(data, tmp_path / "copy")
    (other / "train-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00000.bin"):
        pretrain(other, tmp_path / "new")


def make_data_copy(data: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"config": {"colour": 1}}}, "`model.config` must hold fields of RiGPTConfig, got colour"),
        ({"model": {"config": {"vocab_size": 5}}}, "must not set vocab_size"),
        ({"model": {"kind": "stock-gpt2", "config": {}}}, "`optimizer.name` must be `adamw`"),
        ({"optimizer": {"name": "adamw", "multipliers": {"rows": 2.0}}}, "has one rate for all"),
        ({"optimizer": {"lr": -1.0}}, "`optimizer.lr` must be positive, got -1.0"),
        ({"optimizer": {"beta1": 1.5}}, "`optimizer.beta1` must be at least 0 and below 1, got 1.5"),
        ({"optimizer": {"name": "adamw", "beta2": 1.0}}, "`optimizer.beta2` must be at least 0 and below 1, got 1.0"),
        ({"optimizer": {"momentum": -0.1}}, "`optimizer.momentum` must be at least 0 and below 1, got -0.1"),
        (
            {
                "model": {"kind": "stock-gpt2", "config": {"activation_function": "foo"}},
                "optimizer": {"name": "adamw"},
            },
            "`model.config` must hold values that GPT2LMHeadModel can be made with, got .*'foo'",
        ),
        ({"optimizer": {"warmup": 100}}, "`optimizer.warmup` must not be longer than `run.steps`"),
        ({"steps": 0}, "`run.steps` must be at least 1, got 0"),
        ({"fsdp": True}, "`run.fsdp` shards among processes, got one"),
        ({"precision": "fp16"}, "`run.precision` must be `no` or `bf16` on a CPU, got `fp16`"),
        ({"optimizer": {"warmup": 8}}, "must leave room for each other, got 8 and 6 of 12 steps"),
        ({"optimizer": {"multipliers": {"rows": -1.0}}}, "`optimizer.multipliers` must be at least 0, got -1.0"),
        (
            {"model": {"config": MODEL | {"max_position_embeddings": 8}}},
            "`data.context` must be at most the positions",
        ),
        ({"model": {"start": "nowhere", "config": {}}}, "`model.start` must be the folder of a saved model"),
        ({"trackers": ["nobody"]}, "`run.trackers` must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_options_are_refused(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pretrain(data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def parameters(options) -> int:
    """How many the model has, which is not made."""
    size = options.data.tokenizer.removeprefix("train:")
    with torch.device("meta"):
        model = build_model(options.model, int(size) if size.isdigit() else 50257, options.data.context, 0, 0)
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_twin_of_another_width_would_be_found():
    twins = [parse_options(["--config", name]) for name in ("tiny-docs", "stock-gpt2-tiny-docs")]
    twins[1].model.config["n_embd"] -= 8
    assert abs(parameters(twins[1]) / parameters(twins[0]) - 1) > 0.05


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_whole(preset):
    options = parse_options(["--config", str(preset)])
    text = preset.read_text()
    assert f"training/presets/{preset.name}" in text, "the line that starts it"
    tokens = options.run.steps * options.run.batch_size * options.data.context
    million = tokens / 1e6
    assert any(
        words in text
        for words in (f"{million:.1f} million tokens", f"{million * 1e3:.0f} thousand", f"{million / 1e3:.1f} billion")
    ), f"the arithmetic of the batch: {million} million tokens"
    assert options.run.output == f"runs/{preset.stem}"
    if preset.stem.startswith("stock-gpt2-"):
        size = preset.stem.removeprefix("stock-gpt2-")
        twin = next(path for path in PRESETS if path.stem in (size, f"gpt2-{size}"))
        other = parse_options(["--config", str(twin)])
        assert options.data == other.data
        assert (options.run.steps, options.run.batch_size) == (other.run.steps, other.run.batch_size)
        assert abs(parameters(options) / parameters(other) - 1) <= 0.01
    count = parameters(options) / 1e6
    assert "parameters" not in text or any(f" {count:.{n}f} million parameters" in text for n in (1, 2)), count


def test_the_command_line(capsys, tmp_path, data):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = capsys.readouterr().out
    assert "--optimizer.lr" in shown and "Peak learning rate" in shown and "presets/smoke.yaml" in shown
    options = parse_options(["--config", str(PRESETS[0]), "--run.steps", "7", "--optimizer.warmup", "2"])
    assert options.run.steps == 7
    for wrong in ("--run.stepz 7", "--optimizer.name sgd", "--run.steps many", "--config none.yaml"):
        assert main(wrong.split()) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("pretrain: ") and shown.count("\n") == 1 and shown.endswith("Try --help.\n"), shown
    assert main(["--data.path", str(tmp_path / "none"), "--data.source", "null", "--run.output", str(tmp_path)]) == 2
    assert "pretrain: `data.path` must be a folder of tokenised shards" in capsys.readouterr().err


def test_every_run_option_is_decisive_or_listed():
    decisive = {"steps", "batch_size", "seed", "precision"}
    assert decisive | set(NOT_DECISIVE) == set(RunOptions.__dataclass_fields__)


def test_schedules():
    linear = make_schedule(OptimizerOptions(warmup=4, decay=0.5, final=0.1), 20)
    rates = [linear(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[9] == 1.0
    assert rates[19] == pytest.approx(0.1) and all(a > b for a, b in itertools.pairwise(rates[9:]))
    cosine = make_schedule(OptimizerOptions(warmup=0, decay=1.0, final=0.0, schedule="cosine"), 10)
    assert cosine(9) == pytest.approx(0.0) and cosine(4) == pytest.approx(0.5)
    assert make_schedule(OptimizerOptions(warmup=0, schedule="constant"), 10)(9) == 1.0


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
