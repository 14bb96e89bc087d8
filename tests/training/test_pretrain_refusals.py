"""Refusals of pretraining: places, foreign results, damage, options and data that are not those of the run."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rigpt_hf.checkpoints.disk import temporary_sibling
from rigpt_hf.training import folder
from rigpt_hf.training.build import ensure_data
from rigpt_hf.training.options import DataOptions, PretrainOptions
from rigpt_hf.training.pretrain import main
from tests.training.runs import (
    MODEL,
    interrupted,
    log_of,
    pretrain,
)


def test_what_belongs_to_others_stays(data, tmp_path):
    """A folder with something in it, another run's results, and a run that is still going."""
    (tmp_path / "mine").mkdir()
    owner = tmp_path / "mine" / "run.json"
    said = "`output_dir` must be empty or a run's own.*with run.json of something"
    for text in ('{"mine": 1}', '{"seed": 0, "mine": 1}', "no JSON"):
        owner.write_text(text)
        for force in (False, True):
            with pytest.raises(ValueError, match=said):
                pretrain(data, tmp_path / "mine", force=force)
        assert owner.read_text() == text and list(owner.parent.iterdir()) == [owner]
    owner.rename(tmp_path / "elsewhere.json")
    owner.symlink_to("../elsewhere.json")
    with pytest.raises(ValueError, match=said):
        pretrain(data, tmp_path / "mine")
    assert owner.is_symlink()
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


def test_a_lock_that_is_none_stays(data, tmp_path):
    """A run's own is an empty file; one that was there may be somebody's, and is left."""
    lock = tmp_path / "run" / ".lock"
    for make in (
        lambda: lock.write_text("mine"),
        lock.mkdir,
        lambda: lock.symlink_to("../mine"),
        lambda: lock.symlink_to("nowhere"),
    ):
        lock.parent.mkdir()
        (tmp_path / "mine").touch()
        make()
        for force in (False, True):
            with pytest.raises(ValueError, match="`output_dir` must have nothing else under .lock, got .*Move that"):
                pretrain(data, tmp_path / "run", force=force)
        assert list(lock.parent.iterdir()) == [lock] and (lock.is_symlink() or lock.is_dir() or lock.read_text())
        shutil.rmtree(lock.parent)
    lock.parent.mkdir()
    lock.touch()
    assert pretrain(data, tmp_path / "run", max_steps=2, warmup_steps=1).steps == 2 and lock.is_file()
    shutil.rmtree(lock.parent)
    assert pretrain(data, tmp_path / "run", max_steps=2, warmup_steps=1).steps == 2 and not lock.exists()


LATE = {
    "written to": lambda lock: lock.write_text("years of work"),
    "replaced": lambda lock: (lock.unlink(), lock.write_text("years of work")),
    "replaced by an empty one": lambda lock: (lock.rename(lock.with_name("held")), lock.touch()),
    "a link": lambda lock: (lock.rename(lock.with_name("held")), lock.symlink_to("held")),
    "gone": lambda lock: lock.unlink(),
    "left alone": lambda lock: None,
}


@pytest.mark.parametrize("last_moment", [False, True])
@pytest.mark.parametrize("late", LATE)
def test_a_lock_that_became_somebodys_stays(late, last_moment, tmp_path, monkeypatch):
    """While a run holds it, and also between the last look and the removal."""
    output = tmp_path / "run"
    held = folder.Lock(output)

    def last_look(path):
        LATE[late](path)
        return temporary_sibling(path)

    if last_moment:
        monkeypatch.setattr(folder, "temporary_sibling", last_look)
    else:
        LATE[late](held.file)
    before = {path.name: path.read_text() for path in output.iterdir()} if not last_moment else None
    held.release()
    after = {path.name: path.read_text() for path in output.iterdir()} if output.exists() else {}
    if late in ("gone", "left alone"):
        assert not output.exists(), "what the run made goes"
        return
    assert ".lock" in after and after[".lock"] == ("years of work" if late in ("written to", "replaced") else "")
    assert before is None or after == before
    assert not [name for name in after if name.endswith(".partial")]


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


ENTRY = '{"step": 1, "loss": 2.0, "lr": 0.1, "gradient_norm": 1.0}'
# What is in a run's folder under a name of its own, and is none of its own.
STRANGE = {
    "checkpoints": lambda path: path.write_text("mine"),
    "model": lambda path: path.write_text("mine"),
    "checkpoints/step-00000002": lambda path: (path.parent.mkdir(), path.write_text("mine")),
    ".rigpt-written.json": lambda path: path.mkdir(),
    ".rigpt-written.json link": lambda path: path.symlink_to(path.parent.with_name("mine.json")),
    ".rigpt-written.json damaged": lambda path: path.write_text("mine"),
    "metrics.jsonl": lambda path: path.mkdir(),
    "metrics.jsonl link": lambda path: path.symlink_to(path.parent.with_name("mine.jsonl")),
    "metrics.jsonl dangling": lambda path: path.symlink_to("nowhere"),
} | {
    f"metrics.jsonl {words}": lambda path, words=words: path.write_text(
        ENTRY.replace(*words.split(" ")) + "\n" + ENTRY
    )
    for words in (
        '1, "x",',
        "1, null,",
        "1, 1.5,",
        "1, true,",
        "2.0 []",
        "0.1 null",
        '1.0} 1.0,"validation_loss":"x"}',
        '1.0} 1.0,"mine":"x"}',
    )
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_no_run_has_left_under_its_names_is_refused_before_anything(what, data, tmp_path):
    output, name = tmp_path / "run", what.split(" ")[0]
    output.mkdir()
    (tmp_path / "mine.json").write_text('{"files": {}}')
    (tmp_path / "mine.jsonl").write_text(ENTRY)
    STRANGE[what](output / name)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for force in (False, True):
        with pytest.raises(
            ValueError, match=f"`output_dir` can be replaced only if .*run' with {name}. Move or remove"
        ):
            pretrain(data, output, force=force, max_steps=2, warmup_steps=1)
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_log_that_a_run_may_have_left_is_replaced(data, tmp_path):
    for text in (ENTRY + "\n", ENTRY.replace("2.0", "NaN") + "\n", ENTRY + "\n" + ENTRY[:30], ""):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text(text)
        assert pretrain(data, tmp_path / "run", force=True, max_steps=2, warmup_steps=1).steps == 2
        shutil.rmtree(tmp_path / "run")


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
        for damage in ("", "[]", "{", "[" * 100_000):
            (tmp_path / "data" / name).write_text(damage)
            with pytest.raises(ValueError, match=f"{said} undamaged `{name}`, got .*Make the folder again") as told:
                prepared()
            assert "JSONDecodeError" not in str(told.value)
            assert name == "request.json" or ("nested too deeply" in str(told.value)) == damage.startswith("[[")


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


def test_an_owner_that_somebody_changed_stays(data, straight, tmp_path):
    """Beside checkpoints too; one that a copy made younger is still a run's own."""
    owner = shutil.copytree(straight, tmp_path / "run") / "run.json"
    os.utime(owner, ns=(1, 1))
    assert pretrain(data, tmp_path / "run").started == 12
    changed = json.dumps(json.loads(owner.read_text()) | {"notes": "months of work"})
    owner.write_text(changed)
    with pytest.raises(ValueError, match="with run.json of something else. Move it away, or"):
        pretrain(data, tmp_path / "run")
    assert owner.read_text() == changed
    owner.rename(tmp_path / "elsewhere.json")
    assert pretrain(data, tmp_path / "run").started == 12


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


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


def with_nan(folder):
    path = folder / "model/model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


# What a checkpoint says or holds that no save wrote, though it is signed; and what is said of it.
FIELDS = ("step", "metric", "facts", "files")
SIGNED: dict = {f"{name} {value!r}": {name: value} for name in FIELDS for value in ("x", [1])}
SIGNED |= {"step None": {"step": None}, "step True": {"step": True}, "step -1": {"step": -1}}
SIGNED |= {"files of numbers": {"files": {"a": 1}}, "files of nothing": {"files": {"a": {"size": "x", "sha256": "y"}}}}
SIGNED |= {f"{name} of a list": (name, lambda folder, name=name: torch.save([1], folder / name)) for name in
           ("optimizer.pt", "rng-0.pt")}  # fmt: skip
SIGNED["cut weights"] = "model", lambda folder: spoil(folder / "model/model.safetensors", lambda held: held[:-100])
SIGNED["nan"] = "model", with_nan


# A word and a list for a number, both ways to be no file of weights, and what the library that reads it raises.
TOLD = ("step 'x'", "metric [1]", "files of numbers", "rng-0.pt of a list", "cut weights", "nan")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.full] * (what not in TOLD)) for what in SIGNED]
)
def test_a_checkpoint_that_holds_something_else_is_named(what, data, straight, tmp_path):
    """Its hash is that of what it holds; so nothing but the content can tell."""
    run = interrupted(straight, tmp_path / "run", 12)
    folder = run / "checkpoints/step-00000009"
    record = json.loads((folder / "checkpoint.json").read_text())
    if isinstance(SIGNED[what], dict):
        record |= SIGNED[what]
    else:
        SIGNED[what][1](folder)
        for name, saved in record["files"].items():
            held = (folder / name).read_bytes()
            saved |= {"size": len(held), "sha256": hashlib.sha256(held).hexdigest()}
    del record["sha256"]
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(record))
    said = "must hold finite numbers" if what == "nan" else "`checkpoint` must be as it was saved"
    with pytest.raises(ValueError, match=said) as told:
        pretrain(data, run)
    assert "step-00000009" in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 600


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
    ({"report_to": ["nobody"]}, "`report_to` must be installed ones of tensorboard, .* got 'nobody'. Install it, or"),
]


def test_impossible_options_are_refused(data, tmp_path):
    for options, message in IMPOSSIBLE:
        with pytest.raises(ValueError, match=message):
            pretrain(data, tmp_path / "run", **options)
        assert not (tmp_path / "run" / "checkpoints").exists(), options


def test_a_tracker_that_an_extra_brings_is_named_with_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"got 'tensorboard'. .* Run `pip install 'rigpt-hf\[train\]'`"):
        PretrainOptions(report_to=["tensorboard"])
    with pytest.raises(ValueError, match="got 'wandb'. Install it, or pass --report-to none"):
        PretrainOptions(report_to=["wandb"])
