"""
Checkpoints that are whole or not there at all, kept and removed so that a kill at any moment loses none.

A checkpoint is a folder `step-00001000` with the files of the caller and `checkpoint.json`: step, metric, facts, and
size and SHA-256 of every file. It is filled under a temporary name, brought to the disk, and then renamed.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from rigpt_hf.checkpoints.disk import DiskFullError, leftover_kind, temporary_sibling
from rigpt_hf.checkpoints.workers import ALONE, Workers, together
from rigpt_hf.checkpoints.written import file_sha256, inventory, json_sha256, parse_json

from .facts import Facts


RECORD = "checkpoint.json"
FOLDER = re.compile(r"step-(\d{8,})")
KINDS = "partial|removed"
LEFTOVER = re.compile(rf"\.step-\d{{8,}}\..+-\d+-[0-9a-f]{{8}}\.({KINDS})")

Write = Callable[[Path], Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """
    One saved checkpoint.

    Args:
        path (`Path`): its folder.
        step (`int`): optimizer steps done when it was saved.
        metric (`float`, *optional*): what it was judged by; lower is better.
        facts (`dict`): what the caller recorded, as JSON gives it back: tuples are lists, keys strings.
        files (`dict[str, dict]`): `size` in bytes and `sha256` of each file, by its path in the folder.
    """

    path: Path
    step: int
    metric: float | None
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read the record only; a `ValueError` that says what to do if that is absent or damaged."""
        try:
            record = parse_json((path / RECORD).read_text(encoding="utf-8"))
            digest = record.pop("sha256")
            if digest != json_sha256(record):
                raise ValueError("its own sha256 does not fit")
            return cls(path, *_checked(record["step"], record["metric"], record["facts"], record["files"]))
        except FileNotFoundError as error:
            raise _damaged(path, f"{RECORD} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"{RECORD} is damaged ({' '.join(str(error).split())})") from error

    def others(self) -> list[str]:
        """Paths in its folder that are not of the checkpoint, or that somebody has changed or removed since."""
        folders = {str(parent) for name in (*self.files, RECORD) for parent in PurePosixPath(name).parents}
        there = inventory(self.path)
        own = self.files.keys() | (set() if (self.path / RECORD).is_symlink() else {RECORD})
        added = {name for name, stamp in there.items() if name not in (own if stamp else folders)}
        return sorted(added | {name for name in self.files if not self._is_as_saved(name)})

    def _is_as_saved(self, name: str) -> bool:
        """By the size and the time; only a file that is younger than the record is read."""
        file, saved = self.path / name, self.files[name]
        if file.is_symlink() or not file.is_file() or file.stat().st_size != saved["size"]:
            return False
        # Unlike the time of change of the contents, this one cannot be set; copies may have come in any order.
        return (
            file.stat().st_ctime_ns < (self.path / RECORD).stat().st_ctime_ns or file_sha256(file) == saved["sha256"]
        )

    def verify(self) -> None:
        """
        Read every file once more.

        Raises:
            ValueError: if one is absent, or has another size or other contents than when it was saved; it names the
                file, what is wrong with it, and what to do.
        """
        for name, saved in self.files.items():
            file = self.path / name
            if not file.is_file():
                raise _damaged(self.path, f"{name} is missing")
            if (size := file.stat().st_size) != saved["size"]:
                raise _damaged(self.path, f"{name} has {size} bytes instead of {saved['size']}")
            try:
                digest = file_sha256(file)
            except OSError as error:
                raise _damaged(self.path, f"{name} cannot be read ({error.strerror})") from error
            if digest != saved["sha256"]:
                raise _damaged(self.path, f"{name} has other contents than were saved: its sha256 does not fit")


class CheckpointStore:
    """
    The checkpoints of one run, in a folder that no other run writes to.

    Args:
        folder (`Path`): Where they lie; made by the first save. All processes of a run must see it.
        save_total_limit (`int`): How many of the newest are kept, at least 1.
        save_best_limit (`int`): How many of those with the lowest metric are kept besides.
        workers (`Workers`, *optional*): The processes that save together; the first records and removes.
    """

    def __init__(
        self, folder: Path | str, save_total_limit: int = 2, save_best_limit: int = 1, workers: Workers = ALONE
    ):
        self.folder, self.workers = Path(folder), workers
        self.save_total_limit, self.save_best_limit = save_total_limit, save_best_limit

    def save(self, step: int, write: Write, *, metric: float | None = None, facts: Facts | None = None) -> Path:
        """
        Save a checkpoint, then remove those that need not be kept; every process calls this.

        Args:
            step (`int`): Optimizer steps done; above that of every checkpoint in the folder.
            write (`Callable[[Path], Any]`): Writes the files of this process into the folder that it is given; no two
                processes may write one file.
            metric (`float`, *optional*): Lower is better; for `best`. That of the main process counts.
            facts (`dict`, *optional*): Anything JSON takes, such as the settings of the run, for `check_facts`.

        Returns:
            `Path`: the folder of the checkpoint, which is on the disk as a whole when this returns.

        Raises:
            ValueError: if an argument is impossible, or nothing can be written, as on a full disk. What `write` itself
                raises comes through. The earlier checkpoints stay as they are, and nothing is left of this one.
            RuntimeError: if it failed on another process.
        """
        path, is_main = self._path(step), self.workers.index == 0
        temporary = self.workers.gather(temporary_sibling(path))[0]

        def stage(act: Callable[[], Any]) -> Any:
            return together(self.workers, lambda: self._explained(step, act))

        try:
            record = stage(lambda: self._begin(step, temporary, metric, facts) if is_main else None)
            stage(lambda: write(temporary))
            stage(lambda: self._commit(step, temporary, record) if is_main else None)
        finally:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        return path

    def _begin(self, step: int, temporary: Path, metric: float | None, facts: Facts | None) -> dict[str, Any]:
        """Make the folder to fill; the record of the checkpoint, without its files."""
        record = _header(step, metric, facts)
        if (folders := _folders(self.folder)) and folders[-1][0] >= step:
            raise ValueError(
                f"`step` must be above that of every checkpoint, got {step} with {str(folders[-1][1])!r} there. "
                "Resume from the newest, or save to a new folder."
            )
        temporary.mkdir(parents=True)
        return record

    def _commit(self, step: int, temporary: Path, record: dict[str, Any]) -> None:
        """Bring the filled folder to the disk under its final name, then remove checkpoints that need not be kept."""
        inside = sorted(temporary.rglob("*"))
        files = {}
        for file in inside:
            if file.is_file():
                sync(file)
                name = file.relative_to(temporary).as_posix()
                files[name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
        if RECORD in files:
            raise ValueError(f"`write` must leave the name {RECORD} free: the record of the checkpoint has it.")
        record["files"] = files
        record["sha256"] = json_sha256(record)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        sync(temporary / RECORD)
        for folder in (*(item for item in inside if item.is_dir()), temporary):
            sync(folder)
        temporary.rename(self._path(step))
        sync(self.folder)
        self._retain()

    def checkpoints(self) -> list[Checkpoint]:
        """All of them, by step; a `ValueError` if the record of one is absent or damaged."""
        return [Checkpoint.read(path) for _, path in _folders(self.folder)]

    def latest(self, verify: bool = False) -> Checkpoint | None:
        """
        The newest checkpoint; `None` if there is none.

        Args:
            verify (`bool`): whether to read all its files and compare them with what was saved.

        Raises:
            ValueError: if it is damaged. An earlier one is not taken silently; the message names it.
        """
        if not (folders := _folders(self.folder)):
            return None
        checkpoint = Checkpoint.read(folders[-1][1])
        if verify:
            checkpoint.verify()
        return checkpoint

    def best(self) -> Checkpoint | None:
        """The one with the lowest metric, the earlier of equals; `None` if none has one. Raises as `checkpoints`."""
        return next(iter(_ranked(self.checkpoints())), None)

    def clean(self) -> list[Path]:
        """
        Remove, and name, what killed saves and removals of this machine have left, and nothing else; for the main
        process, at the start.
        """
        items = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        leftovers = []
        for item in items:
            if not LEFTOVER.fullmatch(item.name):
                continue
            if item.is_symlink():
                logger.warning(f"{str(item)!r} is a link; it is left, and so is what it leads to.")
            elif item.is_dir() and leftover_kind(item, FOLDER.pattern, KINDS) is None:
                logger.warning(f"{str(item)!r} is of another machine, or of a process that lives; it is left.")
            elif item.is_dir() and (names := _added(item)):
                logger.warning(f"{str(item)!r} has {', '.join(names[:3])} of something else; it is left.")
            elif item.is_dir():
                leftovers.append(item)
        for leftover in leftovers:
            shutil.rmtree(leftover)
            logger.warning(f"Removed {str(leftover)!r}, which a killed run had left.")
        return leftovers

    def _path(self, step: int) -> Path:
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"`step` must be a whole number, 0 or more, got {step!r}.")
        return self.folder / f"step-{step:08d}"

    def _explained(self, step: int, act: Callable[[], Any]) -> Any:
        """Act, and turn what operating system and safetensors say about a failed write into one line for a person."""
        try:
            return act()
        except (OSError, SafetensorError) as error:
            # Of a full disk whoever wrote there has spoken already, of a name that goes again.
            cause = error.__cause__ or error if isinstance(error, DiskFullError) else error
            reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
            raise ValueError(
                f"`output_dir` must take the checkpoint of step {step}, got {str(self.folder)!r}: {reason}. The "
                "earlier checkpoints are untouched. Correct that (a full disk: free space, or keep fewer) and resume."
            ) from error

    def _retain(self) -> None:
        """Remove all but the last and the best; a damaged checkpoint is neither counted nor touched."""
        whole = []
        for _, path in _folders(self.folder):
            try:
                whole.append(Checkpoint.read(path))
            except ValueError as error:
                logger.warning(str(error))
        kept = {one.path for one in (*whole[-self.save_total_limit :], *_ranked(whole)[: self.save_best_limit])}
        for one in whole:
            try:
                if one.path in kept:
                    continue
                if one.path.is_symlink():
                    logger.warning(f"{str(one.path)!r} is a link; it is left, and so is what it leads to.")
                elif more := one.others():
                    names = ", ".join(more[:3])
                    logger.warning(
                        f"{str(one.path)!r} has {names} of something else, changed or taken away; it is left."
                    )
                else:
                    # A folder half removed must not have the name of a checkpoint.
                    shutil.rmtree(one.path.rename(temporary_sibling(one.path, "removed")))
            except OSError as error:
                # The new checkpoint is safe; that an old one stays is no reason to end the run.
                logger.warning(f"{str(one.path)!r} could not be removed: {error}")


def _added(leftover: Path) -> list[str]:
    """Names in what a kill has left that are not of its record, or were changed since; none where it has no record."""
    try:
        names = Checkpoint.read(leftover).others()
    except ValueError:
        return []
    return [name for name in names if os.path.lexists(leftover / name)]  # others went before the kill


def _checked(step: Any, metric: Any, facts: Any, files: Any) -> tuple[int, float | None, Facts, dict[str, Any]]:
    """The values of a record, if they are what [`CheckpointStore.save`] records."""
    if type(step) is not int or step < 0 or type(metric) not in (type(None), int, float) or type(facts) is not dict:
        raise ValueError("step, metric or facts are none")
    for file in files.values():
        if type(file["size"]) is not int or type(file["sha256"]) is not str:
            raise ValueError("files have no size or hash")
    return step, metric, facts, files


@contextmanager
def restoring(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns what is said of files of a checkpoint that hold something else into the refusal to go on from it."""
    try:
        yield
    except (SafetensorError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise _damaged(checkpoint.path, f"a file holds something else ({reason})") from error


def _header(step: int, metric: float | None, facts: Facts | None) -> dict[str, Any]:
    """The record of a checkpoint without its files, as it comes back from JSON; a `ValueError` if that cannot be."""
    if metric is not None and not math.isfinite(metric):
        raise ValueError(
            f"`metric` must be a finite number, got {metric} at step {step}. Nothing was saved, and the earlier "
            "checkpoints are untouched: resume from one of them, with a lower learning rate."
        )
    try:
        plain = json.loads(json.dumps(facts or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`facts` must be what JSON takes, got something else: {error}.") from error
    return {"step": step, "metric": None if metric is None else float(metric), "facts": plain}


def _ranked(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those with a metric, the best first."""
    return sorted((one for one in checkpoints if one.metric is not None), key=lambda one: (one.metric, one.step))


def _folders(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints in a folder, by step."""
    items = folder.iterdir() if folder.is_dir() else ()
    matches = ((FOLDER.fullmatch(item.name), item) for item in items if item.is_dir())
    return sorted((int(match[1]), item) for match, item in matches if match)


def _damaged(path: Path, problem: str) -> ValueError:
    match = FOLDER.fullmatch(path.name)
    earlier = [item for step, item in _folders(path.parent) if match and step < int(match[1])]
    advice = (
        f"Remove that folder and resume from {str(earlier[-1])!r}."
        if earlier
        else "There is no earlier one: remove that folder and start the run again."
    )
    return ValueError(f"`checkpoint` must be as it was saved, got {str(path)!r}, in which {problem}. {advice}")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the memory of the operating system to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
