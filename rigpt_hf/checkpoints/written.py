"""The record in a folder of what this program wrote there, by which it is known that nobody has changed it since."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


WRITTEN = ".rigpt-written.json"


def inventory(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in nanoseconds of every file in a folder; empty lists for folders in it."""
    content = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            is_folder = path.name in folders and not path.is_symlink()
            content[path.relative_to(folder).as_posix()] = [] if is_folder else stamp(path)
    if is_record(folder / WRITTEN):  # a file of that name that is something else is somebody's
        content.pop(WRITTEN, None)
    return content


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds of a file, or of a link."""
    stat = path.lstat()
    return [stat.st_size, stat.st_mtime_ns]


def look(path: Path) -> list[int] | None:
    """The [`stamp`] of what is at a path; `None` where nothing is."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return stamp(path)
    return None


def fingerprint(path: Path) -> str:
    """Eight hexadecimal digits of what is at a path, by size and time of change of all files."""
    seen = inventory(path) if path.is_dir() and not path.is_symlink() else look(path)
    return json_sha256(seen)[:8]


def foreign(folder: Path, content: dict[str, list[int]] | None = None) -> list[str]:
    """
    Names of all in a folder that this program did not write, or that was changed since.

    Args:
        folder (`Path`): the folder.
        content (`dict`, *optional*): its [`inventory`] when somebody looked last; taken now if not given.
    """
    record = record_of(folder)
    content = inventory(folder) if content is None else content
    return sorted(name for name, stamp in content.items() if not record.knows(name, stamp))


def parse_json(text: str | bytes) -> Any:
    """The value in a text of JSON; a `ValueError` also where it is nested too deeply or a number is too long."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError("a number in it has too many digits") from error


def json_sha256(value: Any) -> str:
    """SHA-256 of a value of JSON, by which it is known that nobody has changed it; the order of names is nothing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Record:
    """
    The files of a folder that this program wrote, as its record says it.

    Args:
        files (`dict`): the [`inventory`] of what was written.
        earlier (`dict`): the [`stamp`]s that some of these had before. A file gets its name after the record has its
            stamp; where a kill came in between, the earlier one is there.
    """

    files: dict[str, list[int]]
    earlier: dict[str, list[int]]

    def knows(self, name: str, stamp: list[int]) -> bool:
        """Whether a file with this stamp is as this program left it."""
        return stamp in (self.files.get(name), self.earlier.get(name))

    def amended(self, name: str, stamp: list[int] | None) -> "Record":
        """The same with one file that will have this stamp, or without it."""
        files, earlier = dict(self.files), dict(self.earlier)
        before = files.pop(name, None)
        earlier.pop(name, None)
        if stamp is None:
            return Record(files, earlier)
        return Record(files | {name: stamp}, earlier if before is None else earlier | {name: before})


def record_of(folder: Path) -> Record:
    """The record in a folder of what was written into it; empty without one."""
    return _parse_record(folder / WRITTEN) or Record({}, {})


def _parse_record(path: Path) -> Record | None:
    try:
        if path.is_symlink():  # it is somebody's
            return None
        content = parse_json(path.read_text(encoding="utf-8"))
        return Record(dict(content["files"]), dict(content.get("earlier", {})))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_record(path: Path) -> bool:
    """Whether a file is a record as this program leaves it."""
    return _parse_record(path) is not None


def is_ours(path: Path, seen: list[int]) -> bool:
    """Whether a file with this [`stamp`] is one that this program wrote and nobody has changed since."""
    return record_of(path.parent).knows(path.name, seen)


def is_replaceable(path: Path) -> bool:
    """Whether nothing is at a path, or a file of this program's as it was written."""
    return not os.path.lexists(path) or is_ours(path, stamp(path))
