"""Nothing that was there before and is not this program's is ever changed or gone; outputs are complete or absent."""

import errno
import json
import os
import shutil
import signal
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from rigpt_hf.checkpoints import disk
from rigpt_hf.checkpoints import folder as module
from rigpt_hf.checkpoints.disk import here
from rigpt_hf.checkpoints.folder import (
    begin_record,
    check_file,
    check_output,
    new_file,
    new_folder,
    temporary_sibling,
    write_text,
)
from rigpt_hf.checkpoints.written import WRITTEN, foreign, parse_json, record_of
from rigpt_hf.cli import common
from rigpt_hf.command_line import Terminated, terminable
from tests.processes import run

from .made import OURS, content, make


def test_what_appears_while_it_works_is_left(tmp_path, either_way, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Path("out")
    for start in ("absent", "empty"):
        if start == "empty":
            output.mkdir()

        def appear():
            output.mkdir(exist_ok=True)
            (output / "thesis.txt").write_text("years of work")

        with pytest.raises(
            ValueError, match="`output_dir` must stay as it is while this runs, got 'out'.*left as it is"
        ):
            make(output, meanwhile=appear)
        assert content(tmp_path) == {"out/thesis.txt": "years of work"}, start
        shutil.rmtree(output)
    # A file of that name, and a change in a model that would be replaced.
    with pytest.raises(ValueError, match="must stay as it is"):
        make(output, meanwhile=lambda: output.write_text("a file"))
    assert content(tmp_path) == {"out": "a file"}
    output.unlink()
    make(output)
    for name in ("thesis.txt", "config.json", "part/notes"):
        with pytest.raises(ValueError, match="must stay as it is"):
            make(output, "new", meanwhile=lambda name=name: (output / name).write_text("mine"))
        assert content(tmp_path) == OURS | {f"out/{name}": "mine"}
        shutil.rmtree(output)
        make(output)
    make(output, "new")
    assert content(tmp_path) == OURS | {"out/part/model": "new"} and foreign(output) == []


def test_of_two_at_once_the_second_refuses(tmp_path, either_way):
    for earlier in (False, True):
        output = tmp_path / str(earlier)
        if earlier:
            make(output, "earlier")
        with pytest.raises(ValueError, match="must stay as it is while this runs"):
            make(output, "second", meanwhile=lambda output=output: make(output, "first"))
        assert content(output)["part/model"] == "first"


def test_what_appears_between_the_check_and_the_work_is_left(tmp_path):
    """Also what this program wrote, and with `force`: another process may have done so."""
    output = tmp_path / "out"
    for force in (False, True):
        seen = check_output(output, None, force)
        make(output, "another's")
        with pytest.raises(ValueError, match="`output_dir` must stay as it is while this runs"):
            new_folder(output, seen).__enter__()
        assert content(tmp_path) == OURS | {"out/part/model": "another's"}
    make(output)
    assert content(tmp_path) == OURS


def test_only_what_was_written_here_is_replaced(tmp_path):
    output = tmp_path / "out"
    make(output)
    check_output(output, "source", force=True)
    kinds = {
        "a web project": lambda: (shutil.rmtree(output), output.mkdir(), (output / "config.json").write_text("{}")),
        "a file more": lambda: (output / "thesis.txt").write_text("years"),
        "a folder more": lambda: (output / "photos").mkdir(),
        "a link": lambda: (output / "link").symlink_to("/"),
        "a changed file": lambda: (output / "config.json").write_text('{"a": 1}'),
        "a damaged record": lambda: (output / WRITTEN).write_text("["),
        "a record of something else": lambda: (output / WRITTEN).write_text('{"files": 3}'),
    }
    for kind, change in kinds.items():
        change()
        before = content(tmp_path)
        with pytest.raises(ValueError, match="`output_dir` can be replaced only if all in it was written by"):
            check_output(output, "source", force=True)
        with pytest.raises(ValueError, match="can be replaced only if"):
            make(output, "new")
        assert content(tmp_path) == before, kind
        shutil.rmtree(output)
        make(output)
    # Cards and the like that are written into it later are this program's too.
    write_text(output / "README.md", "card")
    make(output, "new")
    assert content(tmp_path) == OURS | {"out/part/model": "new"}


def test_if_the_last_step_fails_the_earlier_folder_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "RENAME_EXCHANGE", 2**20)
    output, rename, failed = tmp_path / "out", Path.rename, []
    make(output)

    def fail_to_publish(path, target):
        if path.name.endswith(".previous") and target == output and not failed:
            failed.append(path)
            raise OSError("no")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(Path, "rename", fail_to_publish)
        make(output, "new")
    assert content(tmp_path) == OURS


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make(tmp_path / "out")
    make(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "disk") == {"part/model": "new", "config.json": "{}"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "out"}


def test_a_stop_between_exchange_and_comparison_loses_nothing(tmp_path, monkeypatch):
    output, inventory = tmp_path / "out", module.inventory
    make(output)

    def stopped(folder):
        if (folder / "thesis.txt").exists():  # the earlier folder, already under the temporary name
            monkeypatch.setattr(module, "inventory", inventory)
            raise KeyboardInterrupt
        return inventory(folder)

    def appear():
        (output / "thesis.txt").write_text("years of work")
        monkeypatch.setattr(module, "inventory", stopped)

    with pytest.raises(KeyboardInterrupt):
        make(output, "new", meanwhile=appear)
    assert module.inventory is inventory and "years of work" in content(tmp_path).values()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_exchanges_waits_until_a_foreign_folder_is_back(number, tmp_path, monkeypatch):
    output, exchange, seen = tmp_path / "out", module.exchange, []
    make(output)

    def appear():
        shutil.rmtree(output)
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")

    def exchanged(a, b):
        if not seen:  # it comes after the last look
            appear()
        exchange(a, b)
        seen.append(content(tmp_path))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "exchange", exchanged)
    with pytest.raises((KeyboardInterrupt, Terminated)), terminable():
        make(output, "new")
    assert len(seen) == 2 and "out/part/model" in seen[0], "the new model was there for a moment"
    assert content(tmp_path) == {"out/thesis.txt": "years of work"}


STOPPED = """
import os, shutil, sys
from pathlib import Path
from rigpt_hf.checkpoints import folder as module
output, exchange = Path(sys.argv[1]), module.exchange

def exchanged(a, b):  # after the last look
    output.rename(output.with_name("moved"))
    output.with_name("mine").rename(output)
    exchange(a, b)
    os.kill(os.getpid(), 9)

with module.new_folder(output, module.check_output(output, None, True)) as folder:
    (folder / "config.json").write_text("{}")
    module.exchange = exchanged
"""


@pytest.mark.parametrize("kind", ["plain", "a model of ours"])
def test_a_kill_between_two_exchanges_leaves_a_foreign_folder_under_another_name(kind, tmp_path, caplog):
    make(tmp_path / "out")
    if kind == "plain":
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years of work")
    else:
        make(tmp_path / "mine", "years of work")
    done = run("-c", STOPPED, tmp_path / "out")
    assert done.returncode == -9 and not (tmp_path / "mine").exists(), done.stderr
    for _ in range(2):
        make(tmp_path / "out", "next")
    assert caplog.text.count("is what was at") == 1 and "Removed" not in caplog.text, "said once"
    assert content(tmp_path / "out")["part/model"] == "next" and "years of work" in content(tmp_path).values()


def test_a_folder_with_nothing_but_a_record_is_empty(tmp_path):
    (tmp_path / "out").mkdir()
    write_text(tmp_path / "out/said.json", "ours", named=True)
    (tmp_path / "out/said.json").unlink()
    for force in (False, True):
        check_output(tmp_path / "out", None, force)
    make(tmp_path / "out")
    assert content(tmp_path) == OURS and foreign(tmp_path / "out") == []


def test_a_full_disk_is_named(tmp_path):
    words = RuntimeError("I/O error: No space left on device (os error 28)")
    for writer, error in product(
        (partial(new_folder, seen={}), new_file), (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), words)
    ):
        full = pytest.raises(ValueError, match="must be on a disk that has room.*got '.*out': No space left on device")
        with full, writer(tmp_path / "out"):
            raise error
        with pytest.raises(KeyError), writer(tmp_path / "out"):
            raise KeyError("another failure stays what it is")
    assert content(tmp_path) == {}


# One process per system call that changes the disk, killed just before it; the last one is not killed.
KILLED = """
import os, sys
from pathlib import Path
from rigpt_hf.checkpoints import disk, folder as module
CHANGES = {"mkdir", "rename", "replace", "unlink", "rmdir", "open", "renameat2", "close"}

def count(frame, event, function):
    global seen
    if event == "c_call" and getattr(function, "__name__", "") in CHANGES:
        if seen == number:
            os.kill(os.getpid(), 9)
        seen += 1

def make(output, text):
    with module.new_folder(output, module.check_output(output, None, True)) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "model").write_text(text)
        (folder / "config.json").write_text("{}")

if sys.argv[2] == "two renames":
    disk.RENAME_EXCHANGE = 2**20
for number in range(200):
    output = Path(sys.argv[1], str(number), "out")
    make(output, "weights")
    child = os.fork()
    if not child:
        seen = 0
        sys.setprofile(count)
        make(output, "new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(status)
    if not status:
        break
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_kills_at_every_step(way, tmp_path, caplog):
    """The earlier model or the new one is there, whole; the next run says what it clears away or puts back."""
    done = run("-c", KILLED, tmp_path, way)
    statuses = done.stdout.split()
    assert done.returncode == 0 and set(statuses) == {"9", "0"} and len(statuses) > 15, done.stderr
    outcomes, cleared, moved = set(), 0, 0
    for number, status in enumerate(statuses):
        output = tmp_path / str(number) / "out"
        if output.exists():
            outcomes.add((status, content(output).pop("part/model")))
            assert set(content(output)) == {"part/model", "config.json"} and foreign(output) == []
        caplog.clear()
        make(output, "next")
        assert content(output.parent) == OURS | {"out/part/model": "next"}
        cleared += "which a killed run had left" in caplog.text
        moved += "which a killed run had moved aside" in caplog.text
    assert outcomes == {("9", "weights"), ("9", "new"), ("0", "new")} and cleared > 5
    assert moved == 0 if way == "exchange" else moved > 0


def test_leftovers_of_others_stay(tmp_path):
    """Of processes that live, of other machines, and whatever is not this program's."""
    output = tmp_path / "out"
    names = [temporary_sibling(output).name, f".out.elsewhere-{2**22 + 1}-12345678.partial", ".out.partial"]
    dead = tmp_path / f".out.{here()}-{2**22 + 1}-12345678.partial"
    names += [f".out.{here()}-notes-{2**22 + 1}-12345678.partial", dead.name.replace("partial", "png")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    make(dead)
    (dead / "thesis.txt").write_text("years of work")
    before = content(tmp_path)
    make(output)
    assert content(tmp_path) == before | OURS
    (dead / "thesis.txt").unlink()
    make(output)
    assert set(content(tmp_path)) == {f"{name}/file" for name in names} | set(OURS)
    assert json.loads((output / WRITTEN).read_text())["files"].keys() == {"part", "part/model", "config.json"}


def test_json_that_is_nested_too_deeply_is_a_value_that_is_wrong(tmp_path):
    """So that every reader of JSON answers as for other damage: a record of what was written is none."""
    with pytest.raises(ValueError, match="its brackets are nested too deeply"):
        parse_json("[" * 100_000)
    (tmp_path / WRITTEN).write_text('{"files": ' + "[" * 100_000)
    assert record_of(tmp_path).files == {} and parse_json(b'{"a": [1]}') == {"a": [1]}


def test_a_file_with_the_name_of_the_record_that_is_none_is_left(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for text in ("my notes", '{"a": 1}', "[]"):
        (output / WRITTEN).write_text(text)
        for force in (False, True):
            with pytest.raises(ValueError, match="must be empty or absent|with .rigpt-written.json. Move or remove"):
                check_output(output, None, force)
        with pytest.raises(ValueError, match="with .rigpt-written.json. Move or remove"):
            make(output)
        with new_file(output / "a.json", named=True) as temporary:
            temporary.write_text("1")
        assert content(output) == {"a.json": "1"} and (output / WRITTEN).read_text() == text
        with pytest.raises(ValueError, match="only if this program wrote it"):
            check_file(output / "a.json", "json", force=True)
        (output / "a.json").unlink()


def test_a_link_with_the_name_of_the_record_stays(tmp_path):
    """Also if it leads to a record of another folder."""
    make(tmp_path / "other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WRITTEN).symlink_to(tmp_path / "other" / WRITTEN)
    for begin in (lambda: begin_record(tmp_path / "out"), lambda: make(tmp_path / "out")):
        with pytest.raises(ValueError, match=f"must stay as it is.*{WRITTEN}|with {WRITTEN}. Move"):
            begin()
        assert (tmp_path / "out" / WRITTEN).is_symlink() and foreign(tmp_path / "other") == []
    (tmp_path / "out" / WRITTEN).unlink()
    begin_record(tmp_path / "out")
    assert record_of(tmp_path / "out").files == {} and not (tmp_path / "out" / WRITTEN).is_symlink()


def test_an_output_folder_keeps_its_mode_and_group(tmp_path):
    """Whether it is empty or has an earlier output in it; a new one is as the system makes them."""
    output = tmp_path / "out"
    for mode in (0o700, 0o2770, 0o1777):
        for earlier in (False, True):
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            if earlier:
                make(output)
            with suppress(PermissionError):
                os.chown(output, -1, os.getgid() + 1)
            output.chmod(mode)
            before = output.stat()
            make(output, "new")
            assert (oct(output.stat().st_mode), output.stat().st_gid) == (oct(before.st_mode), before.st_gid)
    shutil.rmtree(output)
    (tmp_path / "plain").mkdir()
    make(output)
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode != mode
    output.chmod(0o555)
    for check in (lambda: make(output, "again"), lambda: check_output(output, None, force=True)):
        with pytest.raises(
            ValueError, match="`output_dir` must be a place that can be written to, got .*out'.*denied"
        ):
            check()
    output.chmod(0o755)
    assert content(tmp_path) == OURS


def test_a_place_where_a_disk_is_mounted_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
        for check in (lambda: make(tmp_path / "out"), lambda: check_output(tmp_path / "out", None, force=True)):
            with pytest.raises(
                ValueError, match="`output_dir` must not be where a disk is mounted, got .*out'. Name a"
            ):
                check()

    def busy(temporary, path):  # as of a mounted folder of the same disk, which `ismount` does not know
        if path.name == "out":
            raise OSError(errno.EBUSY, "Device or resource busy", str(temporary))
        temporary.rename(path)

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="where something is mounted, got .*out'"):
        patched.setattr(module, "give_name", busy)
        make(tmp_path / "out")
    make(tmp_path / "out/new")
    assert content(tmp_path / "out/new").keys() == {"part/model", "config.json"}


def test_folders_that_were_made_on_the_way_go_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for writer in (partial(new_folder, seen={}), partial(common.new_file, argument="json", seen=None)):
        for place in ("mine/a/b/out", "c/out"):
            with pytest.raises(KeyError), writer(tmp_path / place) as temporary:
                assert temporary.parent.is_dir()
                raise KeyError
            assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    # Something has come into one of them meanwhile.
    with pytest.raises(KeyError), new_folder(tmp_path / "mine/a/b/out", {}):
        (tmp_path / "mine/a/thesis.txt").write_text("years of work")
        raise KeyError
    assert content(tmp_path) == {"mine/a/thesis.txt": "years of work"}


def test_the_folder_that_one_is_in_and_the_root_are_refused(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for output in (Path("."), here, tmp_path, Path("..")):
        with pytest.raises(ValueError, match="must not be the folder that you are in, nor one above it"):
            check_output(output, None, force=True)
    for force in (False, True):
        with pytest.raises(ValueError, match="`output_dir` must "):
            check_output(Path("/"), None, force)
    assert check_output(Path("absent/../new"), None, force=False) == {} and not list(here.iterdir())
