"""Pretraining: one process or many, killed or not, the same numbers; and whatever goes wrong loses nothing."""

import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.training import folder, loop
from rigpt_hf.training.build import build_model, ensure_data
from rigpt_hf.training.data import TokenShards, Windows, window_index
from rigpt_hf.training.diagnostics import excess_kurtosis, flops_per_token
from rigpt_hf.training.options import (
    NOT_DECISIVE,
    PRESETS,
    DataOptions,
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
    MODEL,
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
    kept = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert kept[-2:] == ["step-00000009", "step-00000012"] and len(kept) <= 3
    # The same command again has nothing left to do, and harms nothing.
    shutil.copytree(straight, tmp_path / "again")
    again = pretrain(data, tmp_path / "again", diagnose_steps=6)
    assert again.started == 12 and again.losses == [] and log_of(tmp_path / "again") == log
    assert again.model_folder == tmp_path / "again" / "model"


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


def test_what_belongs_to_others_stays(data, tmp_path):
    """A folder with something in it, another run's results, and a run that is still going."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"mine": 1}')
    for force in (False, True):
        with pytest.raises(ValueError, match="`output_dir` must be empty or a run's own.*with run.json of something"):
            pretrain(data, tmp_path / "mine", force=force)
    assert (tmp_path / "mine" / "run.json").read_text() == '{"mine": 1}'
    foreign = tmp_path / "run" / "model"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ValueError, match="replaced only if all in it was written by this program.*thesis.txt"):
            pretrain(data, tmp_path / "run", force=force, max_steps=2, warmup_steps=1)
        assert (foreign / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(foreign)
    assert pretrain(data, tmp_path / "run", max_steps=2, warmup_steps=1).started == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = log_of(tmp_path / "run")
    with pytest.raises(ValueError, match="seed 0 → 7.*--force to"):
        pretrain(data, tmp_path / "run", seed=7, max_steps=2, warmup_steps=1)
    assert log_of(tmp_path / "run") == log
    held = folder.Lock(tmp_path / "run")
    with pytest.raises(ValueError, match="`output_dir` must be a folder that no other run is in"):
        pretrain(data, tmp_path / "run")
    held.release()
    assert pretrain(data, tmp_path / "run", max_steps=2, warmup_steps=1).started == 0


def test_results_that_no_run_wrote_stay(data, straight, tmp_path):
    """A picture or a log of the user's, whatever is forced; also where a run has finished before."""
    log = (straight / "metrics.jsonl").read_text()
    short = {"max_steps": 2, "warmup_steps": 1}
    for name, content in (("loss.png", "mine"), ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2}\n')):
        for before in ("empty", "finished"):
            output = tmp_path / name / before
            if before == "empty":
                output.mkdir(parents=True)
            else:
                shutil.copytree(straight, output)
            (output / name).write_text(content)
            names = sorted(path.name for path in output.iterdir())
            for force in (False, True):
                with pytest.raises(ValueError, match=f"`output_dir` can be replaced only if .* with {name}. Move or"):
                    pretrain(data, output, force=force, **short)
                assert (output / name).read_text() == content and sorted(p.name for p in output.iterdir()) == names
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "metrics.jsonl").write_text(log + log.splitlines()[0][:30])
    with pytest.raises(ValueError, match="with metrics.jsonl of something else. .* pass --force"):
        pretrain(data, killed, **short)
    assert pretrain(data, killed, force=True, **short).steps == 2 and len(log_of(killed)) == 2
    assert not (killed / ".lock").exists()


def test_places_where_no_folder_can_be(tmp_path, capsys):
    """Said before data are made, and nothing is left."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "[").mkdir()
    (tmp_path / "[/b]").touch()
    (tmp_path / "a.txt").write_text("A cat. " * 1000)
    before = sorted(tmp_path.iterdir())
    for place in ("file", "dangling", "file/below", "[/b]", "[/b]/run"):
        words = ["--output-dir", str(tmp_path / place), "--data", str(tmp_path / "a.txt")]
        assert main([*words, "--data-dir", str(tmp_path / "data"), "--report-to", "none"]) == 2
        shown = capsys.readouterr().err
        assert re.match(rf"pretrain.py: `--output-dir` must be a (folder, or a new )?name .* got '{tmp_path}", shown)
        assert shown.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_errors_of_data_say_what_was_typed(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    words = ["--data", str(tmp_path / "texts"), "--data-dir", str(tmp_path / "data"), "--report-to", "none"]
    words += ["--output-dir", str(tmp_path / "run"), "--tokenizer", "train:300"]
    for content, more, said in (
        (b"\xff", [], f"`--data` must hold files of .* got '{tmp_path}/texts/a.txt': it is not UTF-8 at byte 0"),
        (b" ", [], f"`--data` must hold some text, got '{tmp_path}/texts', where all is blank"),
        (b"A cat.", [], "`--eval-share` must "),
        (
            b"A cat.\n\nA dog.",
            ["--data-options", "{text_column: 3}"],
            "`--data-options` must have text as text_column",
        ),
    ):
        (tmp_path / "texts" / "a.txt").write_bytes(content)
        assert main([*words, *more]) == 2
        assert re.match(f"pretrain.py: {said}", capsys.readouterr().err.rpartition("\r")[2].strip()), said
        assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_data_made_from_something_else_are_refused(tmp_path):
    text = "\n<|endoftext|>\n".join(f"The number {index} follows the number {index - 1}." for index in range(3000))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(text)
    ours = {"data_dir": str(tmp_path / "data"), "tokenizer": "train:320", "context_length": 16, "eval_share": 0.1}

    def prepared(**changes):
        return ensure_data(DataOptions(**(ours | {"data": str(tmp_path / "one.txt")} | changes)), progress=False)

    with pytest.raises(ValueError, match="`tokenizer_revision` names a version on the Hub, got '0' with 'train:320'"):
        prepared(tokenizer_revision="0")
    assert prepared() == prepared() == prepared(data=None)
    for changes, name in (
        ({"data": str(tmp_path / "two.txt")}, "data"),
        ({"tokenizer": "train:400"}, "tokenizer"),
        ({"eval_share": 0.2}, "eval_share"),
        ({"max_tokens": 100}, "max_tokens"),
        ({"data_options": {"separator": "\n\n"}}, "data_options.separator"),
    ):
        with pytest.raises(ValueError, match=f"`data_dir` must hold what `{name}` says"):
            prepared(**changes)
    for name, said in (("request.json", "`data_dir` must have an"), ("manifest.json", "`folder` must have an")):
        for damage in ("", "[]", "{"):
            (tmp_path / "data" / name).write_text(damage)
            with pytest.raises(ValueError, match=f"{said} undamaged `{name}`, got .*Make the folder again") as told:
                prepared()
            assert "JSONDecodeError" not in str(told.value)


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


def test_changed_options_are_named(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    owner = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"learning_rate 0.01 → 0.02\. .*--allow-changes"):
        pretrain(data, tmp_path / "run", learning_rate=0.02)
    assert (tmp_path / "run" / "run.json").read_bytes() == owner, "refused means unchanged"
    with pytest.raises(ValueError, match="max_steps 12 → 15"):
        pretrain(data, tmp_path / "run", max_steps=15)
    with pytest.raises(ValueError, match="`max_steps` must be at least the 12 steps that are done"):
        pretrain(data, tmp_path / "run", max_steps=9, allow_changes=True)
    report = pretrain(data, tmp_path / "run", max_steps=15, allow_changes=True)
    assert report.started == 12 and report.steps == 15


def test_damage_is_named(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-00000012" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step-00000012.*model.safetensors.*step-00000009"):
        pretrain(data, tmp_path / "run")
    other = tmp_path / "copy"
    shutil.copytree(data, other)
    shard = other / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[500:900] = bytes(400)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="train-00000.bin.*SHA-256"):
        pretrain(other, tmp_path / "new")
    assert pretrain(other, tmp_path / "new", verify_data=False, max_steps=2, warmup_steps=1).steps == 2
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000.bin"):
        pretrain(other, tmp_path / "new")


IMPOSSIBLE = [
    ({"config_overrides": {"colour": 1}}, "`config_overrides` must hold fields of RiGPTConfig, got colour"),
    ({"config_overrides": {"vocab_size": 5}}, "must not set vocab_size"),
    ({"model_kind": "gpt-5"}, "`model_kind` must be one of rigpt, stock-gpt2.*got 'gpt-5'"),
    ({"model_kind": "stock-gpt2"}, "`optim` must be `adamw` or `muon` for `model_kind` `stock-gpt2`"),
    ({"optim": "adamw", "lr_multipliers": {"rows": 2.0}}, "has one rate for all"),
    ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
    ({"adam_beta1": 1.5}, "`adam_beta1` must be at least 0 and below 1, got 1.5"),
    ({"optim": "adamw", "adam_beta2": 1.0}, "`adam_beta2` must be at least 0 and below 1, got 1.0"),
    ({"momentum": -0.1}, "`momentum` must be at least 0 and below 1, got -0.1"),
    ({"ema_decay": 1.0}, "`ema_decay` must be between 0 and 1, got 1.0"),
    ({"eval_share": 0.0}, "`eval_share` must be between 0 and 1, got 0.0"),
    ({"decay_fraction": 1.5}, "`decay_fraction` must be a share between 0 and 1, got 1.5"),
    ({"max_grad_norm": -1.0}, "`max_grad_norm` must be at least 0, got -1.0"),
    ({"warmup_steps": 100}, "`warmup_steps` must not be more than `max_steps`"),
    ({"warmup_steps": 8}, "must leave room for each other, got 8 and 6 of 12 steps"),
    ({"lr_multipliers": {"rows": -1.0}}, "`lr_multipliers` must be at least 0, got -1.0"),
    ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1, got 0"),
    ({"save_total_limit": 0}, "`save_total_limit` must be at least 1, got 0"),
    ({"save_best_limit": -1}, "`save_best_limit` must be at least 0, got -1"),
    ({"fsdp": True}, "`fsdp` shards among processes, got one"),
    ({"mixed_precision": "fp16"}, "`mixed_precision` must be `no` or `bf16` on a CPU, got `fp16`"),
    (
        {"model_kind": "stock-gpt2", "config_overrides": {"activation_function": "foo"}, "optim": "adamw"},
        "`config_overrides` must hold values that GPT2LMHeadModel can be made with, got .*'foo'",
    ),
    ({"config_overrides": {"tie_word_embeddings": "maybe"}}, "`config_overrides` must fit together: .*'tie_word_emb"),
    ({"config_overrides": {"hidden_size": 15, "num_attention_heads": 2}}, "`head_dim` times .* must be even"),
    (
        {"config_overrides": MODEL | {"max_position_embeddings": 8}},
        "`context_length` must be at most the positions of `config_overrides`, got 16 and 8",
    ),
    ({"init_from": "nowhere"}, "`config_overrides` must be left out with `init_from`"),
    ({"init_from": "nowhere", "config_overrides": {}}, "`init_from` must be the folder of a saved model"),
    ({"report_to": ["nobody"]}, "`report_to` must be installed ones of tensorboard, .* got 'nobody'"),
]


def test_impossible_options_are_refused(data, tmp_path):
    for options, message in IMPOSSIBLE:
        with pytest.raises(ValueError, match=message):
            pretrain(data, tmp_path / "run", **options)
        assert not (tmp_path / "run" / "checkpoints").exists(), options


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
