"""A full disk, a damaged folder, a launcher that does not fit: one line each, and nothing is lost."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints import folder as folders
from rigpt_hf.checkpoints.folder import check_output, new_folder
from rigpt_hf.checkpoints.written import WRITTEN, look
from rigpt_hf.model_cards.runs import training_metadata
from rigpt_hf.training import folder, loop, records, saving, tuning
from rigpt_hf.training.build import check_run
from rigpt_hf.training.checkpoints import CheckpointStore
from rigpt_hf.training.options import PretrainOptions
from rigpt_hf.training.pretrain import main
from rigpt_hf.training.records import Records
from rigpt_hf.training.sharding import answering
from tests.models import tiny_config
from tests.training.runs import interrupted, pretrain, same_run


FULL = "No space left on device"


def test_a_full_disk_loses_nothing(data, straight, tmp_path, monkeypatch):
    """At the log, at a checkpoint, and at the end, by what system, safetensors and tokenizers raise."""
    run = interrupted(straight, tmp_path / "run")
    append, save = Records.append, RiGPTForCausalLM.save_pretrained

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, FULL)

    def full_log(self, entry):
        if entry["step"] == 11:
            # A disk takes a part of a line before it is full.
            with self.path.open("a") as file:
                file.write('{"step": 11, "lo')
            self.look()
            patched.setattr(type(self.path), "open", full)
        append(self, entry)

    def full_model(error):
        def refused(self, path, **options):
            save(self, path, **options)
            if path.parent == run:
                raise error

        return RiGPTForCausalLM, "save_pretrained", refused

    final, unwritable = f"the final .*{FULL}.*same command", f"Error while serializing: I/O error: {FULL}"
    for patch, rule, step in (
        ((Records, "append", full_log), f"the log, got .*metrics.jsonl': {FULL}.*same command", 9),
        ((saving, "save_state", full), f"the checkpoint of step 12.*{FULL}.*untouched", 9),
        (full_model(SafetensorError(unwritable)), final, 12),
        (full_model(OSError(errno.ENOSPC, FULL)), final, 12),
        (full_model(Exception(FULL)), final, 12),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            with pytest.raises(ValueError, match=f"^`output_dir` must take {rule}") as told:
                pretrain(data, run)
        assert "\n" not in str(told.value) and not (run / "model").exists() and not list(run.rglob("*.partial"))
        assert CheckpointStore(run / "checkpoints").latest(verify=True).step == step
        if "log" in rule:
            assert [entry["step"] for entry in Records(run / "metrics.jsonl").read()] == list(range(1, 11))
    assert pretrain(data, run).started == 12
    assert same_run(run, straight)


# What appears, and in the call of what; at the start and once there is an earlier run.
MEANWHILE = {
    "run.json": (loop, "claim"),
    "run.json later": (loop.PretrainingRun, "_advance"),
    "metrics.jsonl": (loop.PretrainingRun, "_resume"),
    "metrics.jsonl later": (loop.PretrainingRun, "_advance"),
    "loss.png": (loop.PretrainingRun, "_advance"),
    "loss.png late": (records, "plot_losses"),
    "model/thesis.txt": (loop.PretrainingRun, "_advance"),
}


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("what", MEANWHILE)
@pytest.mark.by_default(7)
def test_what_appears_while_a_run_works_stays(what, earlier, data, straight, tmp_path, monkeypatch):
    output, name = tmp_path / "run", what.partition(" ")[0]
    if earlier:
        interrupted(straight, output)
    owner, attribute = MEANWHILE[what]
    act = getattr(owner, attribute)

    def appear(*arguments, **options):
        monkeypatch.setattr(owner, attribute, act)
        place = output / name
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.write_text("years of work")
        return act(*arguments, **options)

    monkeypatch.setattr(owner, attribute, appear)
    steps = 10 if earlier else 2
    if what == "run.json later":  # it was claimed, and nobody writes it twice
        assert pretrain(data, output, max_steps=steps, warmup_steps=1, allow_changes=True).steps == steps
        assert (output / name).read_text() == "years of work" and training_metadata(output / "model").steps == steps
        return
    with pytest.raises(ValueError, match="`output_dir` (must|can) .*(appeared or changed|replaced only if)") as told:
        pretrain(data, output, max_steps=steps, warmup_steps=1, allow_changes=True)
    assert (output / name).read_text() == "years of work" and name.split("/")[0] in str(told.value)


def test_a_mistake_of_ours_is_not_taken_for_a_full_disk(data, straight, tmp_path, monkeypatch):
    def wrong(*arguments):
        raise KeyError("a mistake")

    monkeypatch.setattr(loop, "write_results", wrong)
    with pytest.raises(KeyError, match="a mistake"):
        pretrain(data, shutil.copytree(straight, tmp_path / "run"))


def test_a_failure_of_the_main_process_ends_the_others():
    run, done = object.__new__(loop.PretrainingRun), []
    run.rank = 1
    run.workers = SimpleNamespace(gather=lambda own: ["ValueError: The disk is full.", own])
    with pytest.raises(RuntimeError, match="^Process 0 failed and took the others with it. ValueError: The disk is"):
        run._on_main(lambda: done.append("by another than the main process"))
    run.workers = SimpleNamespace(gather=lambda own: [None, own])
    assert run._on_main(lambda: done.append("the same")) is None and done == []


def test_what_backends_say_of_a_lost_process_is_one_line(tmp_path):
    for error in (
        torch.distributed.DistBackendError("NCCL error in: a.cpp:1\nremote process exited"),
        RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7"),
        RuntimeError("Application timeout caused pair closure"),
    ):
        rule = "^Another process of the run has ended or does not answer .*are untouched: .*the same command again.$"
        with pytest.raises(ValueError, match=rule) as told, answering(tmp_path):
            raise error
        assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)
    with pytest.raises(RuntimeError, match="^a mistake$"), answering(tmp_path):
        raise RuntimeError("a mistake")


def test_a_damaged_owner_stands_in_nobodys_way(tmp_path):
    owner, facts = tmp_path / folder.OWNER, {"run": {"seed": 1}}
    (tmp_path / "metrics.jsonl").touch()
    message = "^`output_dir` must tell whose metrics.jsonl it has, but .*run.json' is damaged .*--force"
    for damage in (b'{"model"', b"", bytes(9), b"[]"):
        owner.write_bytes(damage)
        with pytest.raises(ValueError, match=message) as told:
            folder.check_owner(tmp_path, facts, has_checkpoints=False, force=False)
        assert "\n" not in str(told.value) and owner.read_bytes() == damage
        for has_checkpoints in (True, False):
            folder.check_owner(tmp_path, facts, has_checkpoints, force=not has_checkpoints)
        folder.claim(tmp_path, facts, look(owner))
        assert json.loads(owner.read_text()) == facts
    # A whole one is still compared.
    with pytest.raises(ValueError, match="run.seed 1 → 2"):
        folder.check_owner(tmp_path, {"run": {"seed": 2}}, has_checkpoints=False, force=False)


def test_a_run_with_checkpoints_goes_on_although_its_owner_is_damaged(data, straight, tmp_path):
    owner = shutil.copytree(straight, tmp_path / "run") / folder.OWNER
    whole = owner.read_bytes()
    owner.write_bytes(whole[:20])
    assert pretrain(data, tmp_path / "run").started == 12
    assert owner.read_bytes() == whole


def test_an_owner_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen: list = []
    put = folders._put
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(folders, "_put", lambda a, b, may_go: seen.append(str(b)) or put(a, b, may_go))
    folder.claim(tmp_path, {}, None)
    owner = tmp_path / folder.OWNER
    seen = [item for item in seen if WRITTEN not in str(item)]
    assert seen == [owner.stat().st_ino, str(owner), tmp_path.stat().st_ino]


def test_deepspeed_is_refused_in_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = ["--data-dir", str(data), "--data", "null", "--output-dir", str(tmp_path / "run")]
    assert main([*arguments, "--report-to", "none"]) == 2
    shown = capsys.readouterr().err
    assert "pretrain.py: `accelerate` must be configured for data parallelism, got DeepSpeed. Use DDP" in shown
    assert shown.count("\n") == 1 and not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    check_run(PretrainOptions())


@pytest.mark.parametrize("edited", [True, False])
@pytest.mark.parametrize("last", ["append", "cut"])
def test_a_log_that_is_changed_right_after_it_was_written_stays(last, edited, tmp_path, monkeypatch):
    path, put = tmp_path / "metrics.jsonl", folders._put
    log = Records(path)
    for step in (1, 2):
        log.append({"step": step})

    def edit():
        if edited:
            with path.open("a") as file:
                file.write("years of work\n")

    def after(act):
        def acted(*arguments):
            done = act(*arguments)
            patched.undo()
            edit()
            return done

        return acted

    with monkeypatch.context() as patched:
        if last == "append":
            patched.setattr(records, "look", after(look))  # the last look before the line is written
            log.append({"step": 3})
        else:
            patched.setattr(folders, "_put", after(put))
            log.cut(1)
    before = path.read_text()
    assert ("years of work" in before) == edited
    if not edited:
        log.append({"step": 4})
        log.cut(4)
        assert [entry["step"] for entry in log.read()] == ([1, 2, 3, 4] if last == "append" else [1, 4])
        return
    with pytest.raises(ValueError, match="has appeared or changed while this runs, and was left"):
        log.append({"step": 4})
    with pytest.raises(ValueError, match="`output_dir` must stay as it is while this runs"):
        log.cut(1)
    assert path.read_text() == before


def test_a_model_of_ours_that_appears_while_a_run_works_stays(data, straight, tmp_path, monkeypatch):
    """As another program may have put it there; the run's own model of before is replaced."""
    output, finish = tmp_path / "run", loop.PretrainingRun._finish

    def appear(run):
        with new_folder(output / "model", check_output(output / "model", None, force=True)) as folder:
            (folder / "config.json").write_text("of another run")
        return finish(run)

    with monkeypatch.context() as patched:
        patched.setattr(loop.PretrainingRun, "_finish", appear)
        with pytest.raises(ValueError, match="`output_dir` .*model', in which something has appeared or changed mean"):
            pretrain(data, output, max_steps=2, warmup_steps=1)
    assert (output / "model/config.json").read_text() == "of another run"
    # Whoever begins once more has seen it, and it is this program's.
    assert pretrain(data, output, max_steps=2, warmup_steps=1).steps == 2
    assert (output / "model/model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = RiGPTForCausalLM(tiny_config())
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] = float("inf")
    rule = "`learning_rate` must give weights that are finite numbers in float32, got NaN or infinity in `model"
    with pytest.raises(ValueError, match=rule):
        records.write_model(model, model.state_dict(), None, tmp_path / "pretrained", {})
    weight.data[0, 0] = 1e6  # of which float16 has none
    options = SimpleNamespace(output_dir=tmp_path / "tuned", merge=False, lora=None)
    with pytest.raises(ValueError, match=rule.replace("float32", "float16")):
        tuning.write(options, {}, model, None, model.generation_config, torch.float16, {})
    assert not list(tmp_path.iterdir())
