"""The record in a folder of what this program wrote there, by which it is known that nobody has changed it since."""

import json
import os
from contextlib import suppress
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


def foreign(folder: Path, content: dict[str, list[int]] | None = None) -> list[str]:
    """
    Names of all in a folder that this program did not write, or that was changed since.

    Args:
        folder (`Path`): the folder.
        content (`dict`, *optional*): its [`inventory`] when somebody looked last; taken now if not given.
    """
    written = read_written(folder)
    content = inventory(folder) if content is None else content
    return sorted(name for name, stamp in content.items() if written.get(name) != stamp)


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


def read_written(folder: Path) -> dict[str, list[int]]:
    """The record in a folder of what was written into it, as [`inventory`] gave it; empty without one."""
    return _parse_record(folder / WRITTEN) or {}


def _parse_record(path: Path) -> dict[str, list[int]] | None:
    try:  # a link is somebody's
        return None if path.is_symlink() else dict(parse_json(path.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_record(path: Path) -> bool:
    """Whether a file is a record as this program leaves it."""
    return _parse_record(path) is not None


def is_replaceable(path: Path) -> bool:
    """Whether nothing is at a path, or a file that this program wrote and nobody has changed since."""
    return not os.path.lexists(path) or read_written(path.parent).get(path.name) == stamp(path)
