"""Checkpoints that are whole or not there: damage, retention, several processes."""

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rigpt_hf.checkpoints import disk
from rigpt_hf.checkpoints.disk import here, room, temporary_sibling
from rigpt_hf.training import checkpoints as module
from rigpt_hf.training.checkpoints import RECORD, CheckpointStore
from rigpt_hf.training.facts import check_facts
from tests.training.saves import FILES, content, names, tree, writer


def test_what_is_saved_is_found(tmp_path):
    store = CheckpointStore(tmp_path / "a" / "run")
    assert store.latest() is None and store.best() is None and store.clean() == [] and store.checkpoints() == []
    facts = {"learning_rate": 0.1, "sizes": (1, 2), "none": None, "nan": float("inf")}
    path = store.save(7, writer(7), metric=2.5, facts=facts)
    assert path == tmp_path / "a" / "run" / "step-00000007" and names(store.folder) == [path.name]
    found = CheckpointStore(store.folder).latest(verify=True)
    assert (found.path, found.step, found.metric, content(found)) == (path, 7, 2.5, 7)
    assert found.facts == facts | {"sizes": [1, 2]}
    assert sorted(found.files) == sorted(FILES) and found.files["empty"]["size"] == 0
    store.save(100_000_000, writer(100_000_000))
    assert content(store.latest()) == 100_000_000 and store.latest().metric is None and store.latest().facts == {}
    assert store.best().step == 7


def test_the_last_and_the_best_are_kept(tmp_path):
    for last, best, kept in (
        *((1, 0, [6]), (2, 0, [5, 6]), (1, 1, [2, 6]), (2, 2, [2, 3, 5, 6]), (3, 1, [2, 4, 5, 6])),
        (9, 9, [1, 2, 3, 4, 5, 6]),
    ):
        store = CheckpointStore(tmp_path / f"{last} {best}", last, best)
        for step, metric in zip(range(1, 7), (9.0, 1.0, 1.0, 5.0, None, 7.0), strict=True):
            store.save(step, writer(step), metric=metric)
        assert names(store.folder) == [f"step-{step:08d}" for step in kept]
        assert [content(one) for one in store.checkpoints()] == kept and store.latest().step == 6
        assert not best or store.best().step == 2, "the earlier of two that are equally good"


CHANGES = {
    "notes.txt": lambda path: path.write_text("mine"),
    "runs": Path.mkdir,
    "linked": lambda path: path.symlink_to("state"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "state/part-0.bin": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "state/part-1.bin": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": Path.unlink,
    "model.safetensors": lambda path: (path.rename(path.parents[1] / "moved"), path.symlink_to("../moved")),
    "state": lambda path: (path.rename(path.parents[1] / "moved"), path.symlink_to("../moved")),
    "checkpoint.json": lambda path: (path.rename(path.parents[1] / "moved"), path.symlink_to("../moved")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_with_something_else_in_it_stays(name, tmp_path, caplog):
    store, first = CheckpointStore(tmp_path, save_total_limit=1, save_best_limit=0), tmp_path / "step-00000001"
    for step in (1, 2, 3):
        store.save(step, writer(step))
        if step == 1:
            CHANGES[name](first / name)
            os.utime(first / name, ns=(1, 1)) if (first / name).is_file() else None
            left = tree(first)
    assert [path for path in names(tmp_path) if path != "moved"] == ["step-00000001", "step-00000003"]
    assert tree(first) == left and f"has {name} of something else, changed or taken away" in caplog.text.replace(
        "state, state/part-0.bin, state/part-1.bin", name
    )


def test_a_copied_checkpoint_is_still_the_runs(tmp_path, caplog):
    """In whatever order its files came."""
    CheckpointStore(tmp_path / "first").save(1, writer(1))
    for path in sorted((tmp_path / "first").rglob("*")):
        copy = tmp_path / "copy" / path.relative_to(tmp_path / "first")
        copy.mkdir(parents=True) if path.is_dir() else copy.write_bytes(path.read_bytes())
    CheckpointStore(tmp_path / "copy", save_total_limit=1, save_best_limit=0).save(2, writer(2))
    assert names(tmp_path / "copy") == ["step-00000002"] and not caplog.text


def left(step: int, kind: str = "partial") -> str:
    """The name under which a killed process of this machine has left what it saved or removed."""
    return f".step-{step:08d}.{here()}-{2**22 + 1}-0123abcd.{kind}"


def test_links_are_left(tmp_path, caplog):
    """A checkpoint that was moved away and linked back counts; no run is kept from going on, by a leftover neither."""
    store = CheckpointStore(tmp_path / "run", save_total_limit=1, save_best_limit=0)
    (tmp_path / "big").mkdir()
    moved = store.save(1, writer(1)).rename(tmp_path / "big" / "step-00000001")
    for name in ("step-00000001", left(1, "removed"), left(9)):
        (store.folder / name).symlink_to(moved)
    (store.folder / left(8, "removed")).symlink_to("nowhere")
    before, there = tree(moved), names(store.folder)
    assert store.clean() == [] and content(store.latest(verify=True)) == 1
    store.save(2, writer(2))
    assert tree(moved) == before and names(store.folder) == sorted([*there, "step-00000002"])
    for name in there:
        assert f"{name}' is a link; it is left, and so is what it leads to." in caplog.text


def test_everything_is_on_the_disk_before_it_has_its_name_and_the_old_goes_last(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, save_total_limit=1)
    store.save(1, writer(1))
    seen: list = []
    rename = Path.rename

    def renamed(path: Path, to: Path) -> Path:
        seen.append(to.name)
        assert store.latest(verify=True).step == (1 if to.name == "step-00000002" else 2)
        return rename(path, to)

    monkeypatch.setattr(module.os, "fsync", lambda descriptor: seen.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", renamed)
    path = store.save(2, writer(2))
    there = {item.stat().st_ino for item in (path, *path.rglob("*"))}
    named = seen.index(path.name)
    assert len(there) == 7 and set(seen[:named]) == there
    assert seen[named:-1] == [path.name, tmp_path.stat().st_ino] and seen[-1].endswith(".removed")


def test_a_removal_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path, save_total_limit=1)
    store.save(1, writer(1))

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", refuse)
        store.save(2, writer(2))
    assert "step-00000001' could not be removed: [Errno 16] Device or resource busy" in caplog.text
    assert content(store.latest()) == 2 and [one.step for one in store.checkpoints()] == [2]
    assert store.clean() == [] and "of a process that lives; it is left" in caplog.text
    monkeypatch.setattr(disk, "_lives", lambda pid: False)  # as a later process sees it
    assert [path.name[:14] for path in store.clean()] == [".step-00000001"]


def test_clean_removes_leftovers_and_nothing_else(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    store.save(1, writer(1))
    leftovers = [left(2), left(1, "removed"), left(123456789)]
    others = [
        ".step-00000001.removed",
        ".step-00000002.partial",
        ".step-00000003.partial.txt",
        ".git",
        "step-2",
        ".step-3.partial",
        "x.step-00000001.removed",
        "final",
    ]
    for name in leftovers + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / left(4)).touch()  # a file, which no save leaves
    assert [one.step for one in store.checkpoints()] == [1]
    assert [path.name for path in store.clean()] == sorted(leftovers)
    assert names(tmp_path) == sorted([*others, left(4), "step-00000001"])
    assert all(f"Removed '{tmp_path / name}', which a killed run had left." in caplog.text for name in leftovers)


def test_leftovers_that_may_be_somebodys_stay(tmp_path, caplog):
    """Of other machines, of processes that live, with files of others or with changed ones: each is named."""
    store = CheckpointStore(tmp_path)
    elsewhere = [".step-00000002.myhost-12345-deadbeef.partial", ".step-00000001.x-1-deadbeef.removed"]
    alive = temporary_sibling(tmp_path / "step-00000003").name
    for name in (*elsewhere, alive):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("mine")
    added, changed, cut = left(4, "removed"), left(5), left(6, "removed")
    for step, name in ((4, added), (5, changed), (6, cut)):
        store.save(step, writer(step)).rename(tmp_path / name)
        file = next(path for path in sorted((tmp_path / name).iterdir()) if path.is_file() and path.name in FILES)
        if name == added:
            (tmp_path / name / "thesis.txt").write_text("years of work")
        elif name == changed:
            file.write_text("mine")
        else:
            file.unlink()  # before a kill ended the removal
    before = {name: tree(tmp_path / name) for name in (*elsewhere, alive, added, changed)}
    assert [path.name for path in store.clean()] == [cut]
    assert before == {name: tree(tmp_path / name) for name in names(tmp_path)}
    for name in (*elsewhere, alive):
        assert f"{name}' is of another machine, or of a process that lives; it is left." in caplog.text
    assert f"{added}' has thesis.txt of something else; it is left." in caplog.text
    assert f"{changed}' has " in caplog.text and f"Removed '{tmp_path / cut}'" in caplog.text
    (tmp_path / added / "thesis.txt").unlink()
    assert [path.name for path in store.clean()] == [added]


def test_leftovers_of_the_same_step_do_not_mix_in(tmp_path):
    store = CheckpointStore(tmp_path)
    (tmp_path / left(3)).mkdir(parents=True)
    (tmp_path / left(3) / "stale").touch()
    store.save(3, writer(3))
    assert store.latest(verify=True).step == 3
    assert sorted(store.latest().files) == sorted(FILES) and names(tmp_path) == [left(3), "step-00000003"]


def test_impossible_saves_change_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, writer(5))
    before, above, whole = (
        tree(tmp_path),
        "^`step` must be above .* got",
        "^`step` must be a whole number, 0 or more, got",
    )
    for act, message in (
        (lambda: store.save(5, writer(5)), f"{above} 5 with '.*step-00000005' there. "),
        (lambda: store.save(4, writer(4)), f"{above} 4 with .* Resume from the new"),
        (lambda: store.save(-1, writer(1)), f"{whole} -1"),
        (lambda: store.save(6.0, writer(6)), f"{whole} 6.0"),
        (lambda: store.save(6, writer(6), metric=math.nan), "^`metric` must be .* got nan at step 6. Nothing"),
        (lambda: store.save(6, writer(6), metric=math.inf), "^`metric` must be .* got inf at step 6. Nothing"),
        (lambda: store.save(6, writer(6), facts={"a": {1}}), "^`facts` must be what JSON takes, .*set"),
        (lambda: store.save(6, lambda at: (at / RECORD).touch()), "^`write` must leave the name checkpoint"),
        (lambda: store.save(6, shutil.rmtree), "^`output_dir` must take the checkpoint of step 6, .* No such file"),
        (
            lambda: CheckpointStore(store.latest().path / "empty").save(1, writer(1)),
            "^`output_dir` must take .* Not a directory\\. .* untouched",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
        assert tree(tmp_path) == before and names(tmp_path) == ["step-00000005"], message


def edit(path: Path, change: Callable[[bytearray], object]):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


# File, what happens to it, what the message says of it.
DAMAGE = (
    (FILES[1], lambda path: os.truncate(path, 11), "has 11 bytes instead of 8000"),
    (FILES[0], lambda path: os.truncate(path, 0), "has 0 bytes instead of 1"),
    (FILES[0], lambda path: edit(path, lambda data: data.reverse()), "has other contents than were saved"),
    (FILES[3], lambda path: path.unlink(), "is missing"),
    (FILES[3], lambda path: path.write_text("x"), "has 1 bytes instead of 0"),
    (RECORD, lambda path: path.unlink(), "is missing"),
    (RECORD, lambda path: os.truncate(path, 40), "is damaged ("),
    (RECORD, lambda path: path.write_bytes(bytes(9)), "is damaged ("),
    (RECORD, lambda path: path.write_text("[]"), "is damaged ("),
    (
        RECORD,
        lambda path: path.write_text(path.read_text().replace('"metric": 0', '"metric": 1')),
        "is damaged (its own sha256 does not fit)",
    ),
)


def test_damage_is_named_with_the_way_out(tmp_path):
    for number, (name, harm, problem) in enumerate(DAMAGE):
        store = CheckpointStore(tmp_path / str(number))
        store.save(1, writer(1), metric=0.5)
        store.save(2, writer(2), metric=0.25)
        assert content(store.latest(verify=True)) == 2
        first, last = (one.path for one in store.checkpoints())
        harm(last / name)
        with pytest.raises(ValueError, match="^`checkpoint` must be as it was saved, got ") as error:
            store.latest(verify=True)
        assert f"{str(last)!r}, in which {name} {problem}" in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith(f"Remove that folder and resume from {str(first)!r}.")
        shutil.rmtree(last)
        assert content(store.latest(verify=True)) == 1
        harm(first / name)
        with pytest.raises(ValueError, match="There is no earlier one: remove that folder and start the run again.$"):
            store.latest(verify=True)


def test_a_record_damaged_meanwhile_neither_ends_the_run_nor_costs_a_good_checkpoint(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        if step == 3:
            (tmp_path / "step-00000002" / RECORD).unlink()
        store.save(step, writer(step))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 3)]
    assert "checkpoint.json is missing. Remove that folder and resume from" in caplog.text
    assert content(store.latest()) == 3
    with pytest.raises(ValueError, match="checkpoint.json is missing"):
        store.best()
    store.save(4, writer(4))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 3, 4)]


def fails_half_way(error: BaseException):
    def write(folder: Path):
        (folder / "half").write_bytes(b"x" * 1000)
        raise error

    return write


def test_a_save_that_fails_anywhere_loses_nothing(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, save_total_limit=1)
    store.save(1, writer(1))
    before, full = tree(tmp_path), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model")

    def fail(*_, **__):
        raise full

    for owner, call in ((None, "write"), (module.os, "fsync"), (Path, "rename"), (Path, "write_text")):
        with monkeypatch.context() as patched:
            if owner:
                patched.setattr(owner, call, fail)
            with pytest.raises(ValueError, match="^`output_dir` must take the checkpoint of step 2, .*No sp") as error:
                store.save(2, writer(2) if owner else fails_half_way(full))
        assert "The earlier checkpoints are untouched." in str(error.value) and "\n" not in str(error.value)
        assert tree(tmp_path) == before and names(tmp_path) == ["step-00000001"], call
    # What says so already is not said twice.
    with pytest.raises(ValueError) as error, room(tmp_path, "folder"):
        raise full
    with pytest.raises(
        ValueError, match="checkpoint of step 2, got '[^']*': No space left on device. The ear"
    ) as said:
        store.save(2, fails_half_way(error.value))
    assert str(said.value).count("must") == 1
    for kind in (KeyError, KeyboardInterrupt):
        with pytest.raises(kind, match="as it was"):
            store.save(2, fails_half_way(kind("as it was")))
        assert names(tmp_path) == ["step-00000001"]
    store.save(2, writer(2))
    assert content(store.latest()) == 2


def together(tmp_path: Path, fail: tuple[int, BaseException] | None = None) -> list:
    """What three processes get from a save, or raise; threads stand for processes."""
    barrier = threading.Barrier(3, timeout=10)
    slots: list = [None] * 3
    results: list = [None] * 3

    class Worker:
        count = 3

        def __init__(self, index: int):
            self.index = index

        def gather(self, own):
            slots[self.index] = own
            barrier.wait()
            joined = list(slots)
            barrier.wait()
            return joined

    def run(rank: int):
        def write(folder: Path):
            time.sleep(0.02 * rank)
            if fail and fail[0] == rank:
                raise fail[1]
            (folder / f"rank-{rank}").write_text(str(rank))

        store = CheckpointStore(tmp_path, save_total_limit=1, workers=Worker(rank))
        try:
            results[rank] = store.save(2, write, metric=1.0, facts={"rank": rank})
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_save_together(tmp_path):
    assert together(tmp_path) == [tmp_path / "step-00000002"] * 3
    saved = CheckpointStore(tmp_path).latest(verify=True)
    assert sorted(saved.files) == ["rank-0", "rank-1", "rank-2"] and saved.facts == {"rank": 0}
    assert names(tmp_path) == ["step-00000002"]


def test_a_failure_of_one_process_is_a_failure_of_all(tmp_path):
    CheckpointStore(tmp_path).save(1, writer(1))
    for rank in (0, 2):
        results = together(tmp_path, (rank, OSError(errno.ENOSPC, "No space left on device")))
        assert str(results[rank]).startswith("`output_dir` must take the checkpoint of step 2, got ")
        told = f"Process {rank} failed and took the others with it. ValueError: `output_dir`"
        assert str(results[1]).startswith(told)
        assert all("No space left on device" in str(result) for result in results)
        assert names(tmp_path) == ["step-00000001"]
    # And so is a refusal by the main process.
    CheckpointStore(tmp_path).save(2, writer(2))
    assert all("`step` must be above that of every checkpoint" in str(result) for result in together(tmp_path))
    assert content(CheckpointStore(tmp_path).latest()) == 2


def test_only_changed_facts_are_listed():
    facts = {"lr": 0.1, "data": {"files": [1, 2], "sha256": {}}, "epochs": 1, "limit": float("nan")}
    check_facts({}, {}, "--anyway")
    check_facts(json.loads(json.dumps(facts)), facts | {"data": {"sha256": {}, "files": (1, 2)}, "epochs": 1.0}, "it")
    saved = {"lr": 0.1, "data": {"seed": 1, "files": ["a"], "old": True}, "model": {"layers": 2}}
    now = {"lr": 0.2, "data": {"seed": 1, "files": ["b" * 200], "new": None}, "model": {"layers": 2}}
    with pytest.raises(ValueError, match="^What the run is made of must be as when it was started, but ") as error:
        check_facts(saved, now, "--anyway")
    long = '["' + "b" * 78
    listed = f'changed: data.files ["a"] → {long}…; data.new absent → null; data.old true → absent; lr 0.1 → 0.2. Go'
    assert listed in str(error.value) and "layers" not in str(error.value) and "\n" not in str(error.value)
    assert "start in a new folder, or pass --anyway to go on" in str(error.value)
