"""A file that is written takes the place of nothing that this program did not write; its record goes with it."""

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from rigpt_hf.checkpoints import folder as module
from rigpt_hf.checkpoints.certificate import Certificate
from rigpt_hf.checkpoints.disk import here, locked
from rigpt_hf.checkpoints.folder import amend_record, check_file, check_output, new_file, write_text
from rigpt_hf.checkpoints.written import WRITTEN, foreign, look, record_of
from rigpt_hf.pictures import style
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import TokenSymmetry
from tests.models import tiny_config

from .made import OURS, content, make


def test_files_that_appear_are_left(tmp_path):
    path = tmp_path / "picture.png"
    appeared = pytest.raises(
        ValueError, match="`picture` must stay as it is.*appeared or changed meanwhile and was left"
    )
    with appeared, new_file(path, "picture", named=True) as place:
        place.write_text("ours")
        path.write_text("theirs")
    assert content(tmp_path) == {"picture.png": "theirs"}
    with new_file(path, "picture", seen=look(path)) as place:
        place.write_text("ours")
    assert content(tmp_path) == {"picture.png": "ours"}


def test_what_appears_between_the_check_and_the_work_is_left(tmp_path):
    """Also what this program wrote, and with `force`: another process may have done so."""
    path = tmp_path / "picture.png"
    for force in (False, True):
        seen = check_file(path, "picture", force)
        write_text(path, "another's", seen=look(path), named=True)
        with pytest.raises(ValueError, match="`picture` must stay as it is while this runs"):
            write_text(path, "ours", "picture", seen, named=True)
        assert content(tmp_path) == {"picture.png": "another's"}
    write_text(path, "ours", "picture", check_file(path, "picture", True), named=True)
    assert content(tmp_path) == {"picture.png": "ours"}


def test_a_file_keeps_its_mode_and_is_never_more_open(tmp_path):
    """Where it is replaced, also by a library that makes another file; a new one is as the system makes them."""
    path = tmp_path / "runs.json"
    write_text(path, "first")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for mode in (0o600, 0o664):
        path.chmod(mode)
        with new_file(path, seen=look(path)) as place:
            assert place.stat().st_mode & 0o777 == mode
            place.unlink()
            place.write_text("again")
        assert path.read_text() == "again" and path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("place", ["/proc/x.json", "/proc/new/x.json"])
def test_a_place_that_takes_no_file_is_refused_before_the_work(place, tmp_path):
    for check in (check_file, partial(check_output, source=None)):
        with pytest.raises(ValueError, match=f"`output` must be a place that can be written to, got '{place}': "):
            check(Path(place), argument="output", force=True)
    check_file(tmp_path / "a/b/x.json", "output", False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["absent", "ours", "seen"])
def test_what_appears_in_the_last_moment_is_left_and_nothing_else(kind, tmp_path, either_way, monkeypatch):
    """Between the last look and the name, also where something may be replaced; a stop there loses nothing either."""
    path, named = tmp_path / "said.json", kind != "seen"
    record_written, exchange = module.record_written, module.exchange

    def write(text, **patches):
        seen = None if kind == "absent" else look(path)
        with monkeypatch.context() as patched, new_file(path, "json", seen, named=named) as place:
            place.write_text(text)
            for name, patch in patches.items():
                patched.setattr(module, name, patch)

    def appear(*arguments):
        record_written(*arguments)
        if arguments[0] == tmp_path:
            path.unlink(missing_ok=True)
            path.write_text("years of work")

    def stopped(a, b):
        exchange(a, b)
        raise KeyboardInterrupt

    def begin():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write_text(tmp_path / "other.json", "ours", named=True)
        if kind != "absent":
            write_text(path, "earlier", named=True)

    for late in (appear, lambda *arguments: (appear(*arguments), monkeypatch.setattr(module, "exchange", stopped))):
        begin()
        with pytest.raises((ValueError, KeyboardInterrupt)) as told:
            write("new", record_written=late)
        monkeypatch.setattr(module, "exchange", exchange)
        assert "years of work" in content(tmp_path).values(), told.value
        if isinstance(told.value, ValueError):
            assert "which has appeared or changed meanwhile and was left" in str(told.value)
            assert content(tmp_path) == {"said.json": "years of work", "other.json": "ours"}
            assert foreign(tmp_path) == ["said.json"]
    begin()
    write("new")
    assert content(tmp_path) == {"said.json": "new", "other.json": "ours"} and foreign(tmp_path) == []


def test_a_link_is_never_replaced_by_a_file(tmp_path):
    """Refused before anything is made, as with `force`; the file that it leads to is replaced by its own name."""
    path, target = tmp_path / "said.json", tmp_path / "data.json"
    for leads in (True, False):
        path.unlink(missing_ok=True)
        if leads:
            target.write_text("earlier")
        path.symlink_to(target if leads else "nowhere")
        there = os.readlink(path)
        refused = pytest.raises(ValueError, match=f"`json` must be a file itself .*said.json', a link to '{there}'. N")
        with refused, new_file(path, "json", seen=look(path)):
            pytest.fail("work has begun")
        assert os.readlink(path) == there and target.read_text() == "earlier"
        assert {name.name for name in tmp_path.iterdir()} == {"said.json", "data.json"}
    write_text(target, "new", seen=look(target))
    assert target.read_text() == "new"


FILES = {
    "not in the record": lambda path: (path.unlink(), (path.parent / WRITTEN).unlink(), path.write_text("theirs")),
    "changed": lambda path: path.write_text("theirs"),
    "of another time": lambda path: os.utime(path, ns=(1, 1)),
    "a link": lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved")),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("gone")),
    "a damaged record": lambda path: (path.parent / WRITTEN).write_text("["),
}


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_a_file_that_is_named_is_replaced_only_if_it_was_written_here(change, tmp_path):
    path = tmp_path / "said.json"
    write_text(path, "first", named=True)
    write_text(path, "again", seen=check_file(path, "json", True), named=True)
    write_text(path, "ours", seen=look(path))  # as the program's own
    assert content(tmp_path) == {"said.json": "ours"} and foreign(tmp_path) == []
    change(path)
    before = {file.name: file.is_symlink() or file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="`json` can be replaced only if this program wrote it and nobody has ch"):
        check_file(path, "json", True)
    with pytest.raises(ValueError, match="`json` must stay as it is while this runs, got .*said.json"):
        write_text(path, "new", "json", named=True)
    assert before == {file.name: file.is_symlink() or file.read_bytes() for file in tmp_path.iterdir()}


def test_a_record_is_kept_only_of_files_that_appear(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="appeared"), new_file(tmp_path / "a", named=True) as place:
        place.write_text("ours")
        (tmp_path / "a").write_text("theirs")
    assert content(tmp_path) == {"a": "theirs"} and not (tmp_path / WRITTEN).exists()
    (tmp_path / "a").unlink()
    write_text(tmp_path / "b", "ours", named=True)
    write_text(tmp_path / "c", "ours", named=True)
    written = record_of(tmp_path).files

    def fail(*arguments):
        raise OSError("no")

    put = module._put
    for name in ("b", "new"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="no"):
            patched.setattr(module, "_put", lambda at, to, may: (put if to.name == WRITTEN else fail)(at, to, may))
            write_text(tmp_path / name, "new", seen=look(tmp_path / name), named=True)
        assert record_of(tmp_path).files == written and foreign(tmp_path) == []
    amend_record(tmp_path / "b", None)
    assert foreign(tmp_path) == ["b"]
    amend_record(tmp_path / "c", None)
    assert not (tmp_path / WRITTEN).exists()


def test_a_kill_between_a_record_and_its_file_leaves_the_earlier_file_ours(tmp_path, monkeypatch):
    path = tmp_path / "said.json"
    write_text(path, "first", named=True)
    earlier = path.stat().st_mtime_ns
    write_text(path, "again", seen=look(path), named=True)
    os.utime(path, ns=(earlier, earlier))
    path.write_text("first")
    os.utime(path, ns=(earlier, earlier))  # as it was before the second, of which only the record was written
    assert foreign(tmp_path) == []
    write_text(path, "third", seen=check_file(path, "json", True), named=True)
    os.utime(path, ns=(earlier, earlier))
    assert foreign(tmp_path) == ["said.json"]  # two before: nobody's but a person's


def test_what_a_person_changed_stays_theirs_when_something_is_added_to_it(tmp_path):
    path = tmp_path / "config.json"
    for name, owner in (("ours", []), ("theirs", ["config.json"])):
        path.unlink(missing_ok=True)
        write_text(path, "{}", named=True)
        if owner:
            path.write_text('{"theirs": 1}')
        write_text(path, name, seen=look(path), edits=True)
        assert path.read_text() == name and foreign(tmp_path) == owner


def test_writers_of_other_files_in_one_folder_keep_each_others_records(tmp_path):
    """Eight threads, each with ten files: a lock belongs to an open folder, so threads are as processes."""

    def write(writer: int):
        for index in range(10):
            write_text(tmp_path / f"{writer}-{index}", "ours", named=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert foreign(tmp_path) == [] and len(record_of(tmp_path).files) == 80
    with locked(tmp_path):  # as a person may hold it
        write_text(tmp_path / "late", "ours", named=True)
    assert foreign(tmp_path) == []


def test_a_slow_disk_costs_no_record(tmp_path, monkeypatch):
    """A turn is a fifteenth of what a writer waits where nothing moves, and eight writers have eighty turns."""

    def slow(where, *args):
        time.sleep(0.05)
        return record_of(where, *args)

    monkeypatch.setattr(module, "record_of", slow)
    monkeypatch.setattr(module, "locked", partial(locked, seconds=0.75))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_text(tmp_path / str(name), "ours", named=True), range(80)))
    assert foreign(tmp_path) == []


@pytest.mark.parametrize("kind", ["symmetry", "picture", "certificate", "transformation"])
def test_savers_of_python_replace_only_what_they_wrote(kind, tmp_path):
    certificate = Certificate(0.0, 1.0, 0.0, 1.0, 1.0, 0.0, "float32", "float32", 1e-6, {})
    name = {"picture": "it.png", "certificate": "certificate.json"}.get(kind, "it")
    save = {
        "symmetry": lambda: TokenSymmetry(9, [[[1, 2]]]).save(tmp_path / name),
        "picture": lambda: style.save(Figure(), tmp_path / name),
        "certificate": lambda: certificate.save(tmp_path),
        "transformation": lambda: GaugeTransformation(tiny_config(), {}).save(tmp_path / name),
    }[kind]
    save()
    save()
    assert foreign(tmp_path) == []
    for theirs in (lambda: (tmp_path / name).write_text("theirs"), lambda: (tmp_path / name).symlink_to("data")):
        (tmp_path / name).unlink()
        (tmp_path / "data").write_text("theirs")
        theirs()
        with pytest.raises(ValueError, match="can be replaced only if this program wrote it|must be a file itself"):
            save()
        assert (tmp_path / name).read_text() == "theirs"


def test_a_record_that_cannot_be_written_keeps_no_file_from_appearing(tmp_path):
    """As that of another person, in a folder in which everybody may have files; such a file is not replaced later."""
    (tmp_path / WRITTEN).mkdir()
    write_text(tmp_path / "said.json", "ours", named=True)
    assert content(tmp_path) == {"said.json": "ours"}
    with pytest.raises(ValueError, match="can be replaced only if"):
        check_file(tmp_path / "said.json", "json", True)


def test_what_a_killed_writer_of_a_file_left_goes(tmp_path):
    for dead in (2**22 + 1, os.getpid()):
        (tmp_path / f".card.md.{here()}-{dead}-12345678.partial").touch()
    write_text(tmp_path / "card.md", "card")
    assert {path.name for path in tmp_path.iterdir()} == {
        "card.md",
        f".card.md.{here()}-{os.getpid()}-12345678.partial",
    }


def test_a_file_that_cannot_be_recorded_does_not_appear(tmp_path, monkeypatch):
    make(tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="must be on a disk that has room"):
        patched.setattr(module, "record_written", full)
        write_text(tmp_path / "out/card.md", "card")
    assert content(tmp_path) == OURS
    write_text(tmp_path / "out/card.md", "card")
    assert content(tmp_path) == OURS | {"out/card.md": "card"} and foreign(tmp_path / "out") == []
