"""The folder of a fine-tuning's checkpoints: what in it is this program's, and which checkpoint is whole."""

import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

from rigpt_hf.checkpoints.folder import Seen, check_output, write_text
from rigpt_hf.checkpoints.leftovers import remove, remove_leftovers
from rigpt_hf.checkpoints.written import (
    WRITTEN,
    foreign,
    inventory,
    is_record,
    is_replaceable,
    look,
    parse_json,
    record_of,
)

from .finetune_options import FinetuneOptions
from .folder import LOCK, is_lock


RECORD = "finetune.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What else a run leaves there: a record or a checkpoint that was being written, a lock that was being removed, and
# what loggers write.
OF_A_RUN = rf"{re.escape(RECORD)}|{CHECKPOINT.pattern}|{re.escape(LOCK)}|{re.escape(WRITTEN)}"
PASSING = re.compile(rf"\.({OF_A_RUN})\..*-\d+-([0-9a-f]{{8}}){{1,2}}\.(partial|previous|moved)")
# A file of events says when, on which machine and by which process it was begun.
LOGS, LOG = ("runs", "logs"), re.compile(r"events\.out\.tfevents\.(\d+)\.(.+\.\d+)\.\d+")
# Options that may change between a run and the one that resumes it.
FREE = ("output_dir", "keep_checkpoints", "save_steps", "save_total_limit", "report_to", "resume", "force", "quiet")

logger = logging.getLogger(__name__)


def check_places(options: FinetuneOptions) -> Seen:
    """
    A `ValueError` if the result or the checkpoints would take the place of something else; nothing is written. Gives
    what is at the place of the result.
    """
    output, working = Path(options.output_dir), options.working_dir
    for source in (Path(options.model).resolve(), Path(options.data).resolve()):
        for place in (output, working):
            if source.exists() and place.resolve() in (source, *source.parents):
                raise ValueError(
                    f"`output_dir` must not hold what is read, nor the checkpoints beside it, got {str(place)!r}. "
                    "Name another folder."
                )
    seen = check_output(output, options.model, options.force)
    if options.resume:
        if (last := last_checkpoint(working)) is None or read_record(working) is None:
            raise ValueError(f"`resume` needs a checkpoint, got none in {str(working)!r}. Leave it out to begin.")
        check_whole(last)
    elif working.is_dir() and (others := not_of_a_run(working)):
        raise ValueError(
            f"`output_dir` must have nothing else than checkpoints of this program beside it, got {str(working)!r}, "
            f"which has {', '.join(others[:3])} of something else. Move or remove that yourself."
        )
    elif last_checkpoint(working) is not None and not options.force:
        raise ValueError(
            f"`output_dir` must have no checkpoints beside it, got an interrupted run in {str(working)!r}. Pass "
            "`--resume` to go on, or `force=True` to begin anew."
        )
    return seen


def begin(options: FinetuneOptions, record: dict[str, Any]) -> None:
    """
    Remove what an interrupted run has left, all that no later one goes on from, and record this run and by which
    process it logs; for the main process.
    """
    working = options.working_dir
    earlier = (read_record(working) or {}) if options.resume else {}
    seen = look(working / RECORD) if earlier else None
    remove_passing(working)
    gone = [] if options.resume else removable(working)
    for path in gone:
        remove(path)
    if gone:
        names = ", ".join(sorted(path.name for path in gone if path.name != WRITTEN))
        logger.warning(f"Removed {names} of an interrupted run from {str(working)!r}.")
    writers = (_writers(working) if earlier else {}) | {f"{socket.gethostname()}.{os.getpid()}": int(time.time())}
    text = json.dumps(earlier | record | {"writers": writers}, indent=2) + "\n"
    write_text(working / RECORD, text, "output_dir", seen=seen, named=True, edits=True)


def is_of_a_run(path: Path) -> bool:
    """Whether something in the folder of checkpoints is there because a fine-tuning wrote it."""
    if CHECKPOINT.fullmatch(path.name) and not path.is_symlink():
        return bool(record_of(path).files) and not foreign(path)
    if path.name in LOGS and path.is_dir() and not path.is_symlink():
        logs = own_logs(path)
        return bool(logs) and logs == set(path.rglob("*"))
    if path.name == LOCK:
        return is_lock(path)
    if path.name in (RECORD, WRITTEN):
        return is_replaceable(path) if path.name == RECORD else is_record(path)
    return PASSING.fullmatch(path.name) is not None


def own_logs(folder: Path) -> set[Path]:
    """The files of events that a run wrote to a folder of logs, by its record, and the folders they are in."""
    writers, files = _writers(folder.parent), set()
    for path in () if folder.is_symlink() else folder.rglob("*"):
        match = LOG.fullmatch(path.name)
        if match and match[2] in writers and int(match[1]) >= writers[match[2]] and not path.is_symlink():
            files.add(path)
    return files | {parent for path in files for parent in path.parents if folder in parent.parents}


def _writers(working: Path) -> dict[str, int]:
    """The processes that a run has logged by, and since when."""
    writers = (read_record(working) or {}).get("writers")
    return writers if isinstance(writers, dict) else {}


def has_left(working: Path) -> bool:
    """Whether a run has made the folder of checkpoints; an empty one, or one with an empty file, may be somebody's."""
    return working.is_dir() and any(is_of_a_run(path) for path in working.iterdir() if path.name != LOCK)


def not_of_a_run(working: Path) -> list[str]:
    """Names in the folder of checkpoints that no fine-tuning leaves there, or that were changed since."""
    return sorted(path.name for path in working.iterdir() if not is_of_a_run(path))


def removable(working: Path) -> list[Path]:
    """All that a run has left in the folder of checkpoints, but the lock and what was being written."""
    return [
        path
        for path in working.iterdir()
        if is_of_a_run(path) and path.name != LOCK and not PASSING.fullmatch(path.name)
    ]


def remove_passing(working: Path) -> None:
    """Remove what killed processes of this machine were writing there."""
    for name in {match[1] for path in working.iterdir() if (match := PASSING.fullmatch(path.name))}:
        remove_leftovers(working / name)


def clear(working: Path) -> None:
    """Remove what a run has left in the folder of checkpoints, but the lock."""
    own = removable(working)
    # Other trainers may log beside it; what is inside goes first, and a folder only if nothing else is in it.
    logs = sorted(set().union(*(own_logs(working / name) for name in LOGS)), reverse=True)
    for path in logs:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    for path in own:
        remove(path)
    remove_passing(working)


def checkpoints(working: Path) -> list[Path]:
    """Those whose writing was ended, by step."""
    places = [path for path in working.iterdir() if CHECKPOINT.fullmatch(path.name)] if working.is_dir() else []
    return sorted(
        (path for path in places if record_of(path).files), key=lambda path: int(path.name.partition("-")[2])
    )


def last_checkpoint(working: Path) -> Path | None:
    """The last of them."""
    return next(reversed(checkpoints(working)), None)


def check_whole(checkpoint: Path) -> None:
    """A `ValueError` if a file of a checkpoint is absent, cut, or cannot be parsed."""
    sizes = {name: stamp[0] for name, stamp in inventory(checkpoint).items() if stamp}
    for name, stamp in record_of(checkpoint).files.items():
        if stamp and sizes.get(name) != stamp[0]:
            held = f"has {sizes[name]} bytes instead of {stamp[0]}" if name in sizes else "is missing"
            raise damaged(checkpoint, f"{name} {held}")
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint, "trainer_state.json cannot be read") from error


def damaged(checkpoint: Path | str, problem: str) -> ValueError:
    """The refusal to go on from a checkpoint."""
    return ValueError(
        f"`resume` needs a checkpoint as it was saved, got {str(checkpoint)!r}, in which {problem}. Remove that "
        "folder to go on from an earlier one, or pass `force=True` instead of `--resume` to begin anew."
    )


@contextmanager
def loading(checkpoint: Path | str | None) -> Iterator[None]:
    """Turns errors of libraries that read a checkpoint into ours; theirs advise to run code that is in it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:100] if "weights_only" not in str(error) else "it holds other things"
        raise damaged(checkpoint or "", f"a file cannot be read ({type(error).__name__}: {reason})") from error


def retain(working: Path, limit: int) -> None:
    """Remove checkpoints but the last ones, and none in which something was changed."""
    for path in checkpoints(working)[:-limit]:
        if path.is_symlink():
            logger.warning(f"{str(path)!r} is a link; it is left, and so is what it leads to.")
        elif foreign(path):
            logger.warning(f"{str(path)!r} has something else in it; it is left.")
        else:
            shutil.rmtree(path, ignore_errors=True)


def read_record(working: Path) -> dict[str, Any] | None:
    """The record of the run whose checkpoints these are; `None` if there is none, or it is something else."""
    try:
        record = parse_json((working / RECORD).read_text(encoding="utf-8"))
        return record if {"options", "data", "versions"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def check_resumes(options: FinetuneOptions, record: dict[str, Any]) -> None:
    """A `ValueError` if the interrupted run had other options or data."""
    earlier = read_record(options.working_dir) or {"options": asdict(options), "data": {}}
    for name, value in record["options"].items():
        if name not in FREE and earlier["options"].get(name) != value:
            raise ValueError(
                f"`{name}` must be as in the interrupted run, which had {earlier['options'].get(name)!r}, got "
                f"{value!r}. Give the same options, or `force=True` instead of `--resume` to begin anew."
            )
    if earlier["data"] != record["data"]:
        raise ValueError(
            f"`data` must be as in the interrupted run, got other rows in {options.data!r}. Pass `force=True` instead "
            "of `--resume` to begin anew."
        )
