"""Fine-tuning and the files around it: kills, full disks, damage, places, launchers; nothing foreign is lost."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import TrainerCallback

from rigpt_hf.checkpoints.disk import here
from rigpt_hf.checkpoints.written import WRITTEN
from rigpt_hf.training import finetune as program
from rigpt_hf.training import tuning
from rigpt_hf.training.tuning import finetune
from rigpt_hf.training.working import RECORD
from tests.processes import ROOT, run
from tests.training.texts import CHAT, MARKED, TEXT, lines


SHORT = {"max_steps": 4, "save_steps": 2}


def inventory(folder: Path) -> dict[str, bytes]:
    """All names below a folder, and what the files hold."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


class At(TrainerCallback):
    """Acts once so many steps are done."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def interrupt():
    raise KeyboardInterrupt


def killed_at(step: int, options, number: int) -> None:
    """A run in a process of its own that a signal meets after so many steps."""
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            finetune(options, [At(step, lambda: os.kill(os.getpid(), number))])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


@pytest.fixture
def interrupted(options, tmp_path):
    """The folder of a run that was interrupted after its third step, with a checkpoint of the second."""
    with pytest.raises(KeyboardInterrupt):
        finetune(options(**SHORT), [At(3, interrupt)])
    return tmp_path / "out.checkpoints"


def test_a_run_killed_before_its_first_checkpoint_begins_anew(options, tmp_path, caplog):
    """By the very advice that is given; what it left is named."""
    for name in ("kill", "stop"):
        settings = SHORT | {"output_dir": str(tmp_path / name)}
        working = tmp_path / f"{name}.checkpoints"
        if name == "kill":
            killed_at(1, options(**settings), signal.SIGKILL)
            assert (working / RECORD).is_file()
        else:
            with pytest.raises(KeyboardInterrupt):
                finetune(options(**settings), [At(1, interrupt)])
            assert not working.exists(), "nothing to go on from"
        with pytest.raises(ValueError, match="`resume` needs a checkpoint, got none in .* Leave it out to begin"):
            finetune(options(**settings, resume=True))
        caplog.clear()
        assert finetune(options(**settings)).steps == 4
        assert (f"Removed {RECORD} of an interrupted run" in caplog.text) == (name == "kill")
        assert not working.exists()


def test_a_checkpoint_half_written_does_not_count(options, tmp_path, monkeypatch, caplog):
    """The run goes on from the one before; without one it begins anew."""
    save = tuning.trl.SFTTrainer._save_checkpoint
    for steps, left in ((4, {"checkpoint-2"}), (2, set())):
        settings = SHORT | {"output_dir": str(tmp_path / str(steps))}
        working = tmp_path / f"{steps}.checkpoints"

        def cut(self, *arguments, last=steps):
            save(self, *arguments)
            if self.state.global_step == last:
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr(tuning.trl.SFTTrainer, "_save_checkpoint", cut)
            killed_at(-1, options(**settings), signal.SIGKILL)
        assert {path.name for path in working.glob("checkpoint-*")} == left
        assert len(list(working.glob(f".checkpoint-{steps}.*/checkpoint-{steps}/trainer_state.json"))) == 1
        caplog.clear()
        if steps == 4:
            with pytest.raises(ValueError, match="an interrupted run in .* Pass `--resume`"):
                finetune(options(**settings))
        assert finetune(options(**settings, resume=steps == 4)).steps == 4
        assert f"checkpoint-{steps}" in caplog.text and not working.exists()


def test_what_others_have_beside_checkpoints_stays(options, interrupted, tmp_path):
    """Under names that a run might use, in a checkpoint, or changed; with --force, with --resume, at the end."""
    for name in ("README.md", "data/mine.txt", "runs/mine.txt", "checkpoint-9/mine.txt", "checkpoint-2/mine.txt"):
        path = interrupted / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = inventory(tmp_path)
        for changes in ({"force": True}, {}):
            with pytest.raises(
                ValueError, match=rf"nothing else than checkpoints .* which has {name.split('/')[0]} of"
            ):
                finetune(options(**SHORT, **changes))
            assert inventory(tmp_path) == before, name
        path.unlink()
        if not list(path.parent.iterdir()):
            path.parent.rmdir()
    state = interrupted / "checkpoint-2" / "trainer_state.json"
    os.utime(state, ns=(1, 1))
    with pytest.raises(ValueError, match="nothing else than checkpoints .* which has checkpoint-2 of something else"):
        finetune(options(**SHORT, force=True))
    (interrupted / "mine.txt").write_text("mine")
    assert finetune(options(**SHORT, resume=True)).steps == 4
    assert {path.name for path in interrupted.iterdir()} == {"checkpoint-2", "mine.txt"}


@pytest.mark.parametrize("name", ["eval.json", "analysis.py", "optimizer.pt"])
@pytest.mark.by_default(1)
def test_what_appears_where_a_checkpoint_is_being_saved_stays(name, options, tmp_path, monkeypatch):
    """Whatever its name; it is no part of the checkpoint, neither after a kill, and old ones go only without it."""
    save, place = tuning.trl.SFTTrainer._save_checkpoint, tmp_path / f"out.checkpoints/checkpoint-1/{name}"

    def appear(self, *arguments):
        save(self, *arguments)
        if self.state.global_step == 1:
            place.parent.mkdir()
            place.write_text("mine")
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)

    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    monkeypatch.setattr(tuning.trl.SFTTrainer, "_save_checkpoint", appear)
    for killed in (False, True):
        if killed:
            killed_at(-1, options(**settings), signal.SIGKILL)
        else:
            with pytest.raises(ValueError, match="`output_dir` must stay as it is.*checkpoint-1', in which something"):
                finetune(options(**settings))
        for force in (False, True):
            assert place.read_text() == "mine" and len(list(place.parent.iterdir())) == 1
            with pytest.raises(ValueError, match="nothing else than checkpoints .* which has checkpoint-1 of"):
                finetune(options(**settings, force=force))
        place.unlink()
        place.parent.rmdir()
    monkeypatch.undo()
    assert finetune(options(**settings)).steps == 3 and not place.parent.parent.exists(), "without it nothing stays"


def test_a_record_of_the_user_that_appears_stays(options, tmp_path, monkeypatch):
    act, place = tuning.begin, tmp_path / "out.checkpoints" / RECORD
    for text in ("mine", None):

        def appear(*arguments, text=text):
            if text:
                place.write_text(text)
            return act(*arguments)

        monkeypatch.setattr(tuning, "begin", appear)
        if text is None:
            assert finetune(options(**SHORT)).steps == 4 and not place.exists()
            continue
        with pytest.raises(ValueError, match="`output_dir` must stay as it is while this runs, got .*finetune.json'"):
            finetune(options(**SHORT))
        assert place.read_text() == text
        place.unlink()


@pytest.mark.full
def test_logs_of_other_trainers_stay(options, tmp_path, caplog):
    """There before, or appearing meanwhile; this run's own go, also those of the process that was interrupted."""
    working, log = tmp_path / "out.checkpoints", "events.out.tfevents.123.host.7.0"
    theirs = working / "runs" / "Jan01_exp1" / log
    theirs.parent.mkdir(parents=True)
    for make in (lambda: None, lambda: theirs.write_text("mine")):
        make()
        with pytest.raises(ValueError, match="nothing else than checkpoints .* which has runs of something else"):
            finetune(options(**SHORT))
        assert inventory(working).keys() >= {"runs", "runs/Jan01_exp1"} and len(inventory(working)) <= 3
    shutil.rmtree(working)
    settings = SHORT | {"report_to": ["tensorboard"], "logging_steps": 1}

    def add():
        [own] = working.glob("runs/*/events*")
        (own.parent / log).write_text("mine")
        (own.parent / own.name.replace(f".{os.getpid()}.", ".7.")).write_text("mine")

    killed_at(3, options(**settings), signal.SIGKILL)
    assert list(working.glob("runs/*/events*"))
    assert finetune(options(**settings, resume=True)).steps == 4 and not working.exists()
    shutil.rmtree(tmp_path / "out")
    killed_at(3, options(**settings), signal.SIGKILL)
    assert finetune(options(**settings, force=True), [At(1, add)]).steps == 4
    assert {path.name for path in working.iterdir()} == {"runs"}
    assert [path.read_text() for path in working.glob("runs/*/*")] == ["mine"] * 2
    assert "out.checkpoints' has runs of something else; the folder is left" in caplog.text


@pytest.mark.full
def test_what_runs_have_for_themselves_may_be_somebodys(options, tmp_path):
    """An empty folder, a file of the lock's name or like a temporary one."""
    working = tmp_path / "out.checkpoints"
    working.mkdir()
    assert finetune(options(**SHORT)).steps == 4 and list(working.iterdir()) == []
    shutil.rmtree(tmp_path / "out")
    for name in (".lock", f".{RECORD}.mine.partial"):
        (working / name).write_text("mine")
        for force in (False, True):
            with pytest.raises(ValueError, match=f"nothing else than checkpoints .* which has {name} of"):
                finetune(options(**SHORT, force=force))
        assert inventory(working) == {name: b"mine"}
        (working / name).unlink()
    (working / ".lock").touch()
    assert finetune(options(**SHORT)).steps == 4 and [path.name for path in working.iterdir()] == [".lock"]
    shutil.rmtree(tmp_path / "out")
    (working / f".{RECORD}.{here()}-{2**22 + 1}-0123abcd.partial").touch()
    assert finetune(options(**SHORT)).steps == 4 and not working.exists(), "a killed run had left both"
    shutil.rmtree(tmp_path / "out")
    working.mkdir()
    (working / (left := f".{RECORD}.elsewhere-1-0123abcd.partial")).write_text("of a run that another machine makes")
    assert finetune(options(**SHORT)).steps == 4 and [path.name for path in working.iterdir()] == [left]


def test_what_a_person_wrote_into_the_record_of_a_run_stays(interrupted, options):
    """A run that goes on takes it over; one that begins anew is refused."""
    path = interrupted / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"my_notes": "years of work"}))
    with pytest.raises(ValueError, match=f"must have nothing else than checkpoints .*, which has {RECORD} of someth"):
        finetune(options(**SHORT, force=True))
    assert finetune(options(**SHORT, resume=True)).steps == 4
    assert json.loads(path.read_text())["my_notes"] == "years of work" and [*interrupted.iterdir()] == [path]
    shutil.rmtree(interrupted.with_name("out"))
    with pytest.raises(ValueError, match=f"which has {RECORD} of something else"):
        finetune(options(**SHORT, force=True))


def test_old_checkpoints_go_but_not_what_others_put_in_them(options, tmp_path):
    working = tmp_path / "out.checkpoints"
    settings = {"max_steps": 4, "save_steps": 1, "save_total_limit": 1, "keep_checkpoints": True}
    finetune(options(**settings), [At(2, lambda: (working / "checkpoint-2" / "mine.txt").write_text("mine"))])
    assert {path.name for path in working.iterdir()} == {"checkpoint-2", "checkpoint-4", RECORD, WRITTEN}
    assert (working / "checkpoint-2" / "mine.txt").read_text() == "mine"


def test_a_checkpoint_moved_away_and_linked_back_stays(options, tmp_path, caplog):
    checkpoint, moved = tmp_path / "out.checkpoints/checkpoint-1", tmp_path / "big"

    def link():
        checkpoint.rename(moved)
        checkpoint.symlink_to(moved)

    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "keep_checkpoints": True}
    finetune(options(**settings), [At(1, link)])
    assert checkpoint.is_symlink() and (moved / "trainer_state.json").is_file()
    assert "checkpoint-1' is a link; it is left, and so is what it leads to." in caplog.text


def test_one_run_at_a_time(options, tmp_path):
    working = tmp_path / "out.checkpoints"
    working.mkdir()
    with FileLock(working / ".lock"), pytest.raises(ValueError, match="a folder that no other run is in, got"):
        finetune(options(**SHORT))
    assert list(working.iterdir()) == [working / ".lock"]
    assert finetune(options(**SHORT)).steps == 4 and list(working.iterdir()) == [working / ".lock"]
    (working / ".lock").unlink()
    shutil.rmtree(tmp_path / "out")
    assert finetune(options(**SHORT)).steps == 4 and list(working.iterdir()) == []


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_damaged_checkpoint_is_named(options, interrupted, tmp_path):
    """Cut files by their sizes; files of the right size that libraries cannot read, or that would run code."""
    checkpoint = interrupted / "checkpoint-2"
    whole = tmp_path / "whole"
    shutil.copytree(checkpoint, whole)
    canary = tmp_path / "canary"
    for name, content, problem in (
        ("model.safetensors", lambda old: old[:-100], "model.safetensors has .* bytes instead of"),
        ("trainer_state.json", lambda old: old[:-8] + b" " * 8, "trainer_state.json cannot be read"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("optimizer.pt", lambda old: pickle.dumps(Canary(str(canary))).ljust(len(old)), "it holds other things"),
        ("model.safetensors", lambda old: bytes(len(old)), "a file cannot be read"),
        ("rng_state.pth", lambda old: bytes(len(old)), "a file cannot be read|it holds other things"),
    ):
        old = (whole / name).read_bytes()
        (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content(old))
        with pytest.raises(
            ValueError, match=rf"`resume` needs a checkpoint .*checkpoint-2', in which .*({problem})"
        ) as told:
            finetune(options(**SHORT, resume=True))
        assert "\n" not in str(told.value) and "weights_only" not in str(told.value)
        assert str(told.value).endswith("or pass `force=True` instead of `--resume` to begin anew.")
        assert not canary.exists() and not (tmp_path / "out").exists()
        shutil.copy2(whole / name, checkpoint / name)
    assert finetune(options(**SHORT, resume=True)).steps == 4


# A process whose files have a limit; it ignores the signal, so that writes fail as on a full disk.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from rigpt_hf.training import tuning
from rigpt_hf.training.{program} import main
hook = {hook}
def full(*arguments, before=getattr(*hook), **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    return before(*arguments, **options)
setattr(*hook, full)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("tuning.Tuner, '_save_checkpoint'", id="checkpoint"),
        pytest.param("tuning, 'write'", id="result", marks=pytest.mark.full),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_place(hook, options, tmp_path):
    choice = options(**SHORT)
    words = [choice.model, choice.data, choice.output_dir, "--max-steps=4", "--save-steps=2", "--context-length=24"]
    words += ["--learning-rate=0.01", "--per-device-train-batch-size=4"]
    words += ["--cpu", "--quiet"]
    done = run("-c", LIMITED.format(program="finetune", hook=hook), *words, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    place = "out.checkpoints/checkpoint-2" if "Tuner" in hook else "out"
    error = [line for line in done.stderr.splitlines() if line.startswith("finetune.py: ")]
    assert error == done.stderr.splitlines()[-1:] and "Traceback" not in done.stderr
    assert f"must be on a disk that has room for it, got '{tmp_path / place}': File too large. Free space" in error[0]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data.txt"} | ({"out.checkpoints"} if hook.startswith("tuning,") else set())
    assert finetune(options(**SHORT, resume="out.checkpoints" in left)).steps == 4


def test_places_that_are_links_or_below_a_file(options, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    finetune(options(output_dir=str(tmp_path / "link"), **SHORT))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").is_file()
    before = inventory(tmp_path)
    for name, said in (
        ("dangling", "must be a folder, got the file"),
        ("file", "must be a folder, got the file"),
        ("file/below/out", "must be a folder, or a new name in one, got .*below/out': .*file' is none"),
    ):
        with pytest.raises(ValueError, match=f"`output_dir` {said}"):
            finetune(options(output_dir=str(tmp_path / name), **SHORT))
        assert {name: content for name, content in inventory(tmp_path).items() if name != "data.txt"} == {
            name: content for name, content in before.items() if name != "data.txt"
        }
    # What looks like markup is part of a name.
    strange = tmp_path / "[/b] [red]"
    choice = options()
    words = [choice.model, choice.data, str(strange), "--max-steps=1", "--context-length=24", "--cpu"]
    assert program.main(words) == 0
    assert f"Written to {strange}" in capsys.readouterr().out
    assert program.main(words) == 2
    assert repr(str(strange)) in capsys.readouterr().err


def test_a_refused_run_leaves_an_interrupted_one(options, interrupted, tmp_path):
    """Also with --force, when the data or the template turn out to be wrong in the end."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ 1/0 }}" + MARKED)
    before = inventory(interrupted)
    for changes, said in (
        (
            {"content": lines([{"messages": CHAT}] * 3), "name": "d.jsonl", "chat_template": str(template)},
            "ZeroDivision",
        ),
        ({"content": "", "name": "e.jsonl"}, "`data` must hold text"),
        ({"content": TEXT, "lora": 2, "lora_target_modules": ["nothing"]}, "`lora_target_modules` must name layers"),
    ):
        with pytest.raises(ValueError, match=said):
            finetune(options(**SHORT, **changes, eval_share=0.0, force=True))
        assert inventory(interrupted) == before and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_of_several_processes_one_says_what_is_wrong(options, tmp_path):
    choice = options("{", "broken.jsonl")
    words = [ROOT / "training" / "finetune.py", choice.model, choice.data, choice.output_dir, "--cpu", "--quiet"]
    done = run(*words, world=2, TORCHELASTIC_ERROR_FILE=str(tmp_path / "reply"))
    assert json.loads((tmp_path / "reply").read_text())["message"] + "\n" == done.stderr
    (tmp_path / "reply").unlink()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("finetune.py: ") == 1, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"broken.jsonl"}


def test_signals_end_a_run_with_one_line(options, tmp_path, monkeypatch, capsys):
    choice = options()
    words = [choice.model, choice.data, choice.output_dir, "--max-steps=4", "--context-length=24", "--cpu", "--quiet"]
    step = tuning.Tuner.training_step
    for number, code, said in ((signal.SIGINT, 130, "from the keyboard"), (signal.SIGTERM, 143, "by SIGTERM")):

        def signalled(self, *arguments, number=number):
            if self.state.global_step == 1:
                os.kill(os.getpid(), number)
            return step(self, *arguments)

        earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have turned off
        with monkeypatch.context() as patched:
            patched.setattr(tuning.Tuner, "training_step", signalled)
            assert program.main(words) == code
        signal.signal(signal.SIGINT, earlier)
        shown = capsys.readouterr().err
        assert shown == f"finetune.py: stopped {said}.\n" and {path.name for path in tmp_path.iterdir()} == {
            "data.txt"
        }
