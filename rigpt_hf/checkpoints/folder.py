"""
Folders and files that appear complete or not at all, and to which nothing foreign is lost.

One rule decides what may be replaced: only what this program wrote and nobody has changed since. A folder made here
says so itself: `.rigpt-written.json` in it has the size and the time of change of every file.
"""

import ctypes
import errno
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..command_line import check_above
from .workers import ALONE, Workers, together


logger = logging.getLogger(__name__)

WRITTEN = ".rigpt-written.json"
# A disk that takes no more says one of these; some libraries pass on the words alone.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
FULL_WORDS = re.compile("No space left on device|File too large|Disk quota exceeded|Read-only file system")
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class DiskFullError(OSError, ValueError):
    """A disk takes no more; the message names the place."""


def inventory(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in nanoseconds of every file in a folder; empty lists for folders in it."""
    content = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            stat = path.lstat()
            is_folder = path.name in folders and not path.is_symlink()
            content[path.relative_to(folder).as_posix()] = [] if is_folder else [stat.st_size, stat.st_mtime_ns]
    content.pop(WRITTEN, None)
    return content


def foreign(folder: Path, content: dict[str, list[int]] | None = None) -> list[str]:
    """
    Names of all in a folder that [`new_folder`] and [`new_file`] did not write, or that was changed since.

    Args:
        folder (`Path`): the folder.
        content (`dict`, *optional*): its [`inventory`] when somebody looked last; taken now if not given.
    """
    written = read_written(folder)
    content = inventory(folder) if content is None else content
    return sorted(name for name, stamp in content.items() if written.get(name) != stamp)


def parse_json(text: str | bytes) -> Any:
    """What a text of JSON holds; a `ValueError` also where its brackets are nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def read_written(folder: Path) -> dict[str, list[int]]:
    """The record in a folder of what was written into it, as [`inventory`] gave it; empty without one."""
    try:
        return dict(parse_json((folder / WRITTEN).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def record_written(folder: Path, files: dict[str, list[int]]) -> None:
    """Say in a folder what was written into it; `files` is part of its [`inventory`]."""
    with new_file(folder / WRITTEN) as temporary:
        temporary.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def check_output(output: Path, source: str | None, force: bool, argument: str = "output_dir") -> None:
    """
    Raise if an output folder may not be written.

    Args:
        output (`Path`): the folder.
        source (`str`, *optional*): what is converted into it.
        force (`bool`): whether what this program wrote there may be replaced.
        argument (`str`, defaults to `"output_dir"`): what error messages call `output`.

    Raises:
        ValueError: if `output` is a file, holds the source, is not empty without `force`, or would be replaced with
            `force` although something in it is not this program's.
    """
    if (output.exists() or output.is_symlink()) and not output.is_dir():  # a link to nothing is one too
        raise ValueError(f"`{argument}` must be a folder, got the file {str(output)!r}. Name another one.")
    check_above(output, argument, is_folder=True)
    given = None if source is None else Path(source)
    if given is not None and given.exists() and output.resolve() in (given.resolve(), *given.resolve().parents):
        raise ValueError(f"`{argument}` must not hold the source, got {str(output)!r}. Name another folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise ValueError(
            f"`{argument}` must be empty or absent, got {str(output)!r}, which has files in it. Name another folder, "
            "or pass `force=True` to replace it once the new one is complete."
        )
    check_ours(output, argument)


def check_ours(output: Path, argument: str = "output_dir", content: dict[str, list[int]] | None = None) -> None:
    """A `ValueError` if something in a folder that would be replaced is not this program's, or was changed."""
    if names := foreign(output, content):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"`{argument}` can be replaced only if all in it was written by this program and left as it was, got "
            f"{str(output)!r} with {', '.join(names[:3])}{more}. Move or remove that yourself, or name another folder."
        )


@contextmanager
def new_folder(output: Path, argument: str = "output_dir", workers: Workers = ALONE) -> Iterator[Path]:
    """
    A folder beside `output` to write into; it becomes `output` when the block ends well, and is removed if not.

    Args:
        output (`Path`): where the folder shall appear; an earlier one of this program's is replaced at the end.
        argument (`str`, defaults to `"output_dir"`): what error messages call `output`.
        workers (`Workers`, *optional*): the processes that write together; the first makes and publishes the folder.

    Raises:
        ValueError: if nothing can be written there, what is there is not this program's, or it changed meanwhile.
    """
    is_main = workers.index == 0
    output = output.resolve()  # a link to a folder stays, and what it leads to is written
    temporary = workers.gather(temporary_sibling(output))[0]
    earlier: dict[str, list[int]] = {}

    def begin() -> None:
        remove_leftovers(output)
        if output.is_dir():
            earlier.update(inventory(output))
            check_ours(output, argument, earlier)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"`{argument}` must be a place that can be written to, got {str(output)!r}: {error.strerror}. Name "
                "another."
            ) from error

    try:
        together(workers, lambda: begin() if is_main else None)
        with room(output, argument):
            yield temporary
            together(workers, lambda: publish(temporary, output, earlier, argument) if is_main else None)
    finally:
        if is_main and temporary.exists():
            _discard(temporary)


@contextmanager
def new_file(path: Path, argument: str = "output", force: bool = True) -> Iterator[Path]:
    """
    A file beside `path` to write to; it becomes `path` when the block ends well, and is removed if not.

    Args:
        path (`Path`): where the file shall appear.
        argument (`str`, defaults to `"output"`): what error messages call `path`.
        force (`bool`, defaults to `True`): whether an earlier file may be replaced.

    Raises:
        ValueError: if the disk is full or, without `force`, a file has appeared there.
    """
    temporary = temporary_sibling(path)
    remove_leftovers(path)
    earlier = None
    try:
        with room(path, argument):
            yield temporary
            # Before the file is there, which a full disk would otherwise leave behind.
            if path.name != WRITTEN and (path.parent / WRITTEN).is_file():
                stat = temporary.lstat()
                stamp = [stat.st_size, stat.st_mtime_ns]
                earlier = read_written(path.parent)
                record_written(path.parent, earlier | {path.name: stamp})
            if force:
                temporary.replace(path)
            else:
                os.link(temporary, path)  # which replaces nothing
            earlier = None
    except FileExistsError as error:
        raise ValueError(
            f"`{argument}` must not exist yet, got {str(path)!r}, which appeared meanwhile and was left. Name another "
            "file, or pass `force=True`."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        if earlier is not None and read_written(path.parent) != earlier:
            record_written(path.parent, earlier)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete, in the place of an earlier one."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def room(output: Path, argument: str) -> Iterator[None]:
    """Turns what libraries say of a full disk into one line that names the place."""
    try:
        yield
    except Exception as error:
        reason = FULL_WORDS.search(str(error))
        if isinstance(error, DiskFullError) or not (reason or (isinstance(error, OSError) and error.errno in FULL)):
            raise
        said = reason.group() if reason else os.strerror(error.errno)  # type: ignore[attr-defined]
        raise DiskFullError(
            f"`{argument}` must be on a disk that has room for it, got {str(output)!r}: {said}. Free space, "
            "or name another place; nothing was left."
        ) from error


def temporary_sibling(output: Path, kind: str = "partial") -> Path:
    """A name beside `output`, on the same file system, that nothing else uses and that says which process made it."""
    return output.parent / f".{output.name}.{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}"


def _here() -> str:
    """This machine, and the space in which its processes have their numbers: containers have their own."""
    with suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def remove_leftovers(output: Path) -> None:
    """Remove, and name, what killed processes of this machine have left beside `output`; nothing foreign in it."""
    made_here = re.compile(
        rf"\.{re.escape(output.name)}\.{re.escape(_here())}-(\d+)-[0-9a-f]{{8}}\.(partial|previous)"
    )
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        match = made_here.fullmatch(path.name)
        if match is None or _lives(int(match[1])):
            continue
        if match[2] == "previous" and not output.exists():
            path.rename(output)
            logger.warning(f"Put back {str(output)!r}, which a killed run had moved aside.")
        elif _discard(path):
            logger.warning(f"Removed {str(path)!r}, which a killed run had left.")


def _discard(path: Path) -> bool:
    """Remove what was made under a temporary name, unless files of others were moved there; whether it is gone."""
    if (path / WRITTEN).exists() and foreign(path):
        logger.warning(f"{str(path)!r} has files of others that were moved there; it is left.")
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def publish(temporary: Path, output: Path, earlier: dict[str, list[int]], argument: str = "output_dir") -> None:
    """
    Put the finished folder in the place of `output`.

    Args:
        temporary (`Path`): the finished folder.
        output (`Path`): where it goes.
        earlier (`dict`): the [`inventory`] of `output` when the work began.
        argument (`str`, defaults to `"output_dir"`): what error messages call `output`.

    Raises:
        ValueError: if something has appeared or changed there meanwhile; it is left as it is.
    """
    record_written(temporary, inventory(temporary))
    try:
        if not earlier:
            temporary.rename(output)  # which replaces nothing but an empty folder
            return
        exchange(temporary, output)
        if inventory(temporary) == earlier:
            return
        exchange(temporary, output)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    raise ValueError(
        f"`{argument}` must stay as it is while this runs, got {str(output)!r}, in which something has appeared or "
        "changed. It was left as it is, and nothing was written. Run it again, or name another folder."
    )


def exchange(a: Path, b: Path) -> None:
    """Exchange the names of two folders, in one step where the system can."""
    with suppress(AttributeError, OSError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
            return
    aside = temporary_sibling(b, "previous")
    b.rename(aside)
    try:
        a.rename(b)
    except OSError:
        aside.rename(b)
        raise
    aside.rename(a)
