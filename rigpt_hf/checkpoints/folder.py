"""
Folders and files that appear complete or not at all, and to which nothing foreign is lost.

One rule decides what may be replaced: only what this program wrote and nobody has changed since. A folder that is
written says so itself, and so does the folder of a file that a person named: `.rigpt-written.json` in it has the size
and the time of change of every file.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..command_line import check_above
from ..stops import deferred
from .disk import (
    DiskFullError,
    check_writable,
    exchange,
    folders_above,
    give_name,
    locked,
    room,
    temporary_sibling,
)
from .leftovers import discard, remove, remove_leftovers
from .workers import ALONE, Workers, together
from .written import WRITTEN, Record, fingerprint, foreign, inventory, is_ours, is_record, look, record_of, stamp


# What was in a folder when it was checked, by which it is known later that nothing has changed: an [`inventory`].
Seen = dict[str, list[int]]

logger = logging.getLogger(__name__)


def record_written(folder: Path, record: Record) -> None:
    """Say in a folder what was written into it."""
    with new_file(folder / WRITTEN) as temporary:
        temporary.write_text(json.dumps(vars(record), indent=1) + "\n", encoding="utf-8")


def begin_record(folder: Path) -> None:
    """Have a record in a folder, which [`new_file`] keeps from here on."""
    with locked(folder):
        if not is_record(folder / WRITTEN):
            record_written(folder, Record({}, {}))


def amend_record(path: Path, stamp: list[int] | None) -> None:
    """Have a file that gets this stamp in the record beside it; without a stamp it goes, and a record of nothing."""
    with locked(path.parent):
        record = record_of(path.parent)
        amended = record.amended(path.name, stamp)
        if amended.files:
            record_written(path.parent, amended)
        elif record.files:
            (path.parent / WRITTEN).unlink()


def check_file(path: Path | None, argument: str, force: bool) -> list[int] | None:
    """
    Raise if a file that a person named may not be written; `None` is fine.

    Args:
        path (`Path`, *optional*): the file.
        argument (`str`): what error messages call it.
        force (`bool`): whether an earlier file of this program's may be replaced.

    Returns:
        `list[int]`, *optional*: the [`stamp`] of what is there, which alone [`new_file`] replaces when it is given it.

    Raises:
        ValueError: if it is a folder or in no place to write to, is there without `force`, or would be replaced
            although this program did not write it, or somebody has changed it since.
    """
    if path is None:
        return None
    if path.is_dir():
        raise ValueError(f"`{argument}` must be a file, got the folder {str(path)!r}. Name a file in it.")
    seen = look(path)
    if seen and not force:  # a link to nothing is one too
        raise ValueError(
            f"`{argument}` must not exist yet, got {str(path)!r}. Name another file, or pass `force=True`."
        )
    if seen and not is_ours(path, seen):
        raise ValueError(
            f"`{argument}` can be replaced only if this program wrote it and nobody has changed it since, got "
            f"{str(path)!r}. Move or remove it yourself, or name another file."
        )
    check_above(path, argument)
    check_writable(path, argument)
    return seen


def check_no_link(path: Path, argument: str = "output") -> None:
    """A `ValueError` if a link is where a file would be replaced: what it leads to would stay as it was."""
    if path.is_symlink():
        raise ValueError(
            f"`{argument}` must be a file itself to be replaced, got {str(path)!r}, a link to {os.readlink(path)!r}. "
            "Name what it leads to, or another file."
        )


def check_output(output: Path, source: str | None, force: bool, argument: str = "output_dir") -> Seen:
    """
    Raise if an output folder may not be written; a folder that a killed run had moved aside is put back.

    Args:
        output (`Path`): the folder.
        source (`str`, *optional*): what is converted into it.
        force (`bool`): whether what this program wrote there may be replaced.
        argument (`str`, defaults to `"output_dir"`): what error messages call `output`.

    Returns:
        `dict`: the [`inventory`] of what is there, for [`new_folder`], which replaces that and nothing else.

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
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"`{argument}` must not be the folder that you are in, nor one above it, as another takes its place, got "
            f"{str(output)!r}. Name another, or go elsewhere first."
        )
    check_writable(output, argument)
    remove_leftovers(output.resolve())
    check_place(output, argument)
    seen = inventory(output.resolve()) if output.resolve().is_dir() else {}
    if seen and not force:
        raise ValueError(
            f"`{argument}` must be empty or absent, got {str(output)!r}, which has files in it. Name another folder, "
            "or pass `force=True` to replace it once the new one is complete."
        )
    check_ours(output, argument, seen)
    return seen


def check_place(output: Path, argument: str = "output_dir") -> None:
    """A `ValueError` if there is a folder that may not be changed, or whose name cannot be given to another."""
    if output.is_dir() and os.path.ismount(output):
        raise ValueError(
            f"`{argument}` must not be where a disk is mounted, got {str(output)!r}. Name a new folder in it."
        )
    if output.is_dir() and not (os.access(output, os.W_OK | os.X_OK) and output.stat().st_mode & 0o222):
        raise ValueError(
            f"`{argument}` must be a place that can be written to, got {str(output)!r}: {os.strerror(errno.EACCES)}. "
            "Name another."
        )


def check_ours(output: Path, argument: str = "output_dir", content: Seen | None = None) -> None:
    """A `ValueError` if something in a folder that would be replaced is not this program's, or was changed."""
    if names := foreign(output, content):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"`{argument}` can be replaced only if all in it was written by this program and left as it was, got "
            f"{str(output)!r} with {', '.join(names[:3])}{more}. Move or remove that yourself, or name another folder."
        )


@contextmanager
def new_folder(output: Path, seen: Seen, argument: str = "output_dir", workers: Workers = ALONE) -> Iterator[Path]:
    """
    A folder beside `output` to write into; it becomes `output` when the block ends well, and is removed if not.

    Args:
        output (`Path`): where the folder shall appear.
        seen (`dict`): what [`check_output`] gave before the work began: what is replaced at the end.
        argument (`str`, defaults to `"output_dir"`): what error messages call `output`.
        workers (`Workers`, *optional*): the processes that write together; the first makes and publishes the folder.

    Raises:
        ValueError: if nothing can be written there, or what is there is not what was seen; it is left.
    """
    is_main, typed = workers.index == 0, output
    output = output.resolve()  # a link to a folder stays, and what it leads to is written
    temporary = workers.gather(temporary_sibling(output))[0]

    def begin() -> None:
        remove_leftovers(output)
        check_place(output, argument)
        if (inventory(output) if output.is_dir() else {}) != seen:
            raise _changed(argument, typed)
        if output.is_dir() and not seen:  # the files in its record were taken away
            (output / WRITTEN).unlink(missing_ok=True)
        try:
            above.enter_context(folders_above(output))
            temporary.mkdir()
            if output.is_dir():
                _as_open(output, temporary)
        except OSError as error:
            raise ValueError(
                f"`{argument}` must be a place that can be written to, got {str(typed)!r}: {error.strerror}. Name "
                "another."
            ) from error

    with ExitStack() as above:
        try:
            together(workers, lambda: begin() if is_main else None)
            with room(typed, argument):
                yield temporary
                together(workers, lambda: publish(temporary, output, seen, argument, typed) if is_main else None)
        finally:
            if is_main and temporary.exists():
                discard(temporary)


@contextmanager
def new_file(
    path: Path,
    argument: str = "output",
    seen: list[int] | None = None,
    *,
    named: bool = False,
    edits: bool = False,
) -> Iterator[Path]:
    """
    A file beside `path` to write to; it becomes `path` when the block ends well, and is removed if not.

    Args:
        path (`Path`): where the file shall appear.
        argument (`str`, defaults to `"output"`): what error messages call `path`.
        seen (`list[int]`, *optional*): the [`stamp`] of an earlier file that is to be replaced, when it was looked at,
            as [`check_file`] gives it; nothing else is, and the mode stays. A link is refused at once.
        named (`bool`, defaults to `False`): whether a person named the file; the folder gets a record of it then.
        edits (`bool`, defaults to `False`): whether what the earlier file says lives on, such as a configuration with
            one entry more; what was somebody's, or was changed by somebody, stays theirs then.

    Raises:
        ValueError: if the disk is full, or something is there that is not what was seen; it is left.
    """
    if seen is not None:
        check_no_link(path, argument)
    temporary = temporary_sibling(path)
    remove_leftovers(path)

    def may_go(there: Path) -> bool:
        return is_record(there) if path.name == WRITTEN else look(there) == seen

    def keep_mode() -> None:
        if os.path.lexists(path) and may_go(path):
            _as_open(path, temporary)

    try:
        with room(path, argument):
            if seen is not None:
                temporary.touch(mode=0o600)
                keep_mode()
            yield temporary
            keep_mode()  # some libraries make another file of that name
            if os.path.lexists(path) and not may_go(path):
                raise FileExistsError(path)
            with _recorded(path, temporary, named, edits):
                _put(temporary, path, may_go)
    except FileExistsError as error:
        raise ValueError(
            f"`{argument}` must stay as it is while this runs, got {str(path)!r}, which has appeared or changed "
            "meanwhile and was left. Run it again, or name another place."
        ) from error
    finally:
        discard(temporary)


@contextmanager
def named_file(path: Path, argument: str = "path") -> Iterator[Path]:
    """[`new_file`] at a name that a program gives, in the place of nothing or of a file of this program's."""
    check_no_link(path, argument)
    with new_file(path, argument, check_file(path, argument, force=True), named=True) as temporary:
        yield temporary


def _put(temporary: Path, path: Path, may_go: Callable[[Path], bool]) -> None:
    """Give what is finished its name; a `FileExistsError` if something has it that must not go, which is left."""
    with suppress(FileExistsError):
        return give_name(temporary, path)
    marks = fingerprint(path) + fingerprint(temporary)
    if not may_go(path):
        raise FileExistsError(path)
    aside = temporary_sibling(path, "previous", marks)
    with deferred():
        temporary.rename(aside)
        number, goes = aside.lstat().st_ino, False
        try:
            exchange(aside, path)
            if not (goes := may_go(aside)):  # looked at once nobody can change it by its name
                exchange(aside, path)
        finally:
            if goes or (os.path.lexists(aside) and aside.lstat().st_ino == number):
                aside.rename(temporary)  # by this name it is nobody's but ours
                remove(temporary)
    if not goes:
        raise FileExistsError(path)


@contextmanager
def _recorded(path: Path, temporary: Path, named: bool, edits: bool) -> Iterator[None]:
    """Have the file that appears in this block in the record beside it; arguments as of [`new_file`]."""
    there, record = look(path), path.parent / WRITTEN
    earlier = record_of(path.parent).files.get(path.name)
    is_kept = path.name != WRITTEN and (is_record(record) or not os.path.lexists(record))
    if edits and there and not is_ours(path, there):
        is_kept = False
    try:
        try:
            # Before the file is there, which a full disk would otherwise leave behind.
            if is_kept and (named or record.is_file()):
                amend_record(path, stamp(temporary))
        except DiskFullError as error:
            raise (error.__cause__ or error) from None  # which is said of the file
        except OSError:
            if not named:
                raise
            is_kept = False  # The record is somebody else's: the file appears, and is not replaced later.
        yield
    except BaseException:
        with suppress(OSError):  # the first failure is the one to know
            if is_kept:
                amend_record(path, earlier)
        raise


def write_text(
    path: Path, text: str, argument: str = "output", seen: list[int] | None = None, **options: bool
) -> list[int]:
    """Write a text file that appears complete, and give its [`stamp`]; arguments as of [`new_file`]."""
    with new_file(path, argument, seen, **options) as temporary:
        temporary.write_text(text, encoding="utf-8")
        written = stamp(temporary)  # by its own name it may soon be another's
    return written


def _as_open(earlier: Path, temporary: Path) -> None:
    """Give what is being written the group and the mode of what it replaces."""
    with suppress(OSError):
        os.chown(temporary, -1, earlier.stat().st_gid)
    shutil.copymode(earlier, temporary)


def publish(temporary: Path, output: Path, seen: Seen, argument: str, typed: Path) -> None:
    """
    Put the finished folder in the place of `output`.

    Args:
        temporary (`Path`): the finished folder.
        output (`Path`): where it goes.
        seen (`dict`): the [`inventory`] of `output` when it was checked.
        argument (`str`), typed (`Path`): what error messages call `output`, and how a person wrote it.

    Raises:
        ValueError: if something has appeared or changed there meanwhile; it is left as it is.
    """
    record_written(temporary, Record(inventory(temporary), {}))
    try:
        if seen:
            _put(temporary, output, lambda there: inventory(there) == seen)
        else:
            give_name(temporary, output)
    except FileExistsError:
        raise _changed(argument, typed) from None
    except OSError as error:
        if error.errno != errno.EBUSY:  # of a folder of the same disk nobody knows before
            raise
        raise ValueError(
            f"`{argument}` must not be where something is mounted, got {str(typed)!r}. Name a new folder in it."
        ) from error


def _changed(argument: str, typed: Path) -> ValueError:
    return ValueError(
        f"`{argument}` must stay as it is while this runs, got {str(typed)!r}, in which something has appeared or "
        "changed meanwhile. It was left as it is, and nothing was written. Run it again, or name another folder."
    )
