"""A run's folder: whose it is, one run at a time in it, and signals that ask the run to stop."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rigpt_hf.checkpoints.disk import give_name, temporary_sibling
from rigpt_hf.checkpoints.folder import begin_record, check_ours, new_file
from rigpt_hf.checkpoints.written import WRITTEN, is_record, is_replaceable, look, parse_json
from rigpt_hf.command_line import check_above

from .checkpoints import FOLDER, sync
from .facts import check_facts
from .records import CURVES, LOG, OWNER


LOCK = ".lock"
# Results of a run beside its checkpoints, which a new one would replace.
LEFT = (LOG, "model", CURVES)


class Lock:
    """
    Keeps other runs out of a folder until it is released or this process ends, however it ends; for the main process.

    Args:
        folder (`Path`): Made if it is not there; taken away at the release if it was, and nothing is in it.
        transient (`bool`, defaults to `False`): Take it away too if it was there, because a run had made it, and with
            it the lock that the run left.

    Raises:
        ValueError: if another run is in the folder, it cannot be made, or something else has the lock's name.
    """

    def __init__(self, folder: Path, transient: bool = False):
        self.made = [path for path in (folder, *folder.parents) if not path.exists()] or [folder] * transient
        self.file = folder / LOCK
        if not is_lock(self.file):
            raise ValueError(
                f"`output_dir` must have nothing else under {LOCK}, got {str(self.file)!r}, which is not the empty "
                "file that runs have there. Move that away, or name another folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_own = transient or not os.path.lexists(self.file)
            self.held = FileLock(self.file)
            self.held.acquire(timeout=0)
            self.own = _empty_file(self.file) if is_own else None
        except Timeout as error:
            raise ValueError(
                f"`output_dir` must be a folder that no other run is in, got {str(folder)!r}. Wait, or name another."
            ) from error
        except OSError as error:
            raise ValueError(
                f"`output_dir` must be a place that can be written to, got {str(folder)!r}: {error.strerror}. Name "
                "another."
            ) from error

    def release(self) -> None:
        """Let others in; the lock's file goes if a run made it and it is still empty."""
        self._remove()  # before the release: whoever opened it looks whether it still has a name
        self.held.release()
        with suppress(OSError):
            for path in self.made:
                path.rmdir()

    def _remove(self) -> None:
        if self.own is None or _empty_file(self.file) != self.own:
            return
        aside = temporary_sibling(self.file)
        try:
            self.file.rename(aside)
        except FileNotFoundError:
            return
        if _empty_file(aside) == self.own:  # looked at once nobody can change it by its name
            aside.unlink()
        else:
            give_name(aside, self.file)


def _empty_file(path: Path) -> tuple[int, int] | None:
    """Device and inode of an empty file; `None` of anything else."""
    return (path.stat().st_dev, path.stat().st_ino) if is_file(path) and path.stat().st_size == 0 else None


def is_lock(path: Path) -> bool:
    """Whether nothing is at a path, or what a run may have left there: an empty file."""
    return not os.path.lexists(path) or (is_file(path) and path.stat().st_size == 0)


def check_place(folder: Path) -> None:
    """A `ValueError` if no folder can be there, or something in it would be replaced that no run wrote."""
    check_above(folder, "output_dir", is_folder=True)
    log, picture = folder / LOG, folder / CURVES
    lines = log.read_bytes().splitlines() if log.is_file() else []
    # A kill may have cut the last line.
    is_ours = all(map(_is_entry, lines[:-1])) and all(map(_is_cut_entry, lines[-1:]))
    content = {} if is_ours and (look(log) is None or is_file(log)) else {log.name: [0]}
    # What could not be written at the end is refused at the start.
    saved = folder / "checkpoints"
    folders = [folder / "model", saved, *(path for path in saved.glob("step-*") if FOLDER.fullmatch(path.name))]
    content |= {path.relative_to(folder).as_posix(): [0] for path in folders if look(path) and not path.is_dir()}
    if look(folder / WRITTEN) and not is_record(folder / WRITTEN):
        content[WRITTEN] = [0]
    if stamp := look(picture):
        content[picture.name] = stamp
    check_ours(folder, content=content)
    if (folder / "model").is_dir():
        check_ours(folder / "model")


def _is_cut_entry(line: bytes) -> bool:
    return _is_entry(line) or (line.startswith(b'{"step": ') and not line.endswith(b"}"))


def is_file(path: Path) -> bool:
    """Whether a file is at a path, and no link to one."""
    return path.is_file() and not path.is_symlink()


def _is_entry(line: bytes) -> bool:
    try:
        entry = parse_json(line)
        numbers = [entry[name] for name in ("step", "loss", "lr", "gradient_norm")]
    except (ValueError, TypeError, KeyError):
        return False
    numbers += [entry["validation_loss"]] if "validation_loss" in entry else []
    words = any(isinstance(value, str) for value in entry.values())  # a run writes none
    return type(numbers[0]) is int and all(type(number) in (int, float) for number in numbers) and not words


def check_owner(folder: Path, facts: dict[str, Any], has_checkpoints: bool, force: bool) -> None:
    """
    Look at whose folder this is; for the main process.

    Raises:
        ValueError: if there are results of another run, or of nobody known, and no checkpoint to go on from, or as
            [`check_place`] does.
    """
    owner = folder / OWNER
    left = [name for name in LEFT if (folder / name).exists()]
    # A damaged one of a run with checkpoints, or of one that is replaced, stands in nobody's way.
    if not (is_replaceable(owner) or _is_text(owner, facts)) and not (
        (has_checkpoints or left) and _is_damaged(owner)
    ):
        raise ValueError(
            f"`output_dir` must be empty or a run's own, got {str(folder)!r} with {OWNER} of something else. Move it "
            "away, or name another folder."
        )
    # Checkpoints have facts of their own, which are compared when one is taken up.
    if left and not has_checkpoints and not force:
        if not owner.is_file():
            raise ValueError(
                f"`output_dir` must be empty or a run's own, got {str(folder)!r} with {', '.join(left)} of something "
                "else. Name another folder, or pass --force to replace them."
            )
        check_facts(_read_owner(owner, left), facts, override="--force to replace its results")
    check_place(folder)


def claim(folder: Path, facts: dict[str, Any], seen: list[int] | None) -> None:
    """
    Say whose folder this is, once nothing is left that could refuse and before anything is replaced; `seen` is the
    stamp of what says so and was looked at by [`check_owner`].
    """
    begin_record(folder)
    with new_file(folder / OWNER, "output_dir", seen=seen) as temporary:
        temporary.write_bytes(_text(facts))
        sync(temporary)
    sync(folder)


def _text(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, indent=2).encode() + b"\n"


def _is_text(owner: Path, facts: dict[str, Any]) -> bool:
    """Whether a copied folder has what would be written, so that nothing is lost."""
    return is_file(owner) and owner.read_bytes() == _text(facts)


def _is_damaged(owner: Path) -> bool:
    if not is_file(owner):
        return False
    try:
        _read_owner(owner, [])
    except ValueError:
        return True
    return False


def _read_owner(owner: Path, left: list[str]) -> dict[str, Any]:
    try:
        saved = parse_json(owner.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("not an object")
        return saved
    except ValueError as error:
        raise ValueError(
            f"`output_dir` must tell whose {', '.join(left)} it has, but {str(owner)!r} is damaged "
            f"({' '.join(str(error).split())}). Name another folder, or pass --force to replace them."
        ) from error


class StopRequests:
    """Inside, SIGTERM and SIGINT are noted by number in `received`; a second one acts as without this."""

    received = 0

    def __enter__(self) -> "StopRequests":
        self.earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, self.earlier[signal.Signals(number)])
