"""The disk under a checkpoint: full disks, folders above, temporary names, and names that replace nothing."""

import ctypes
import errno
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..stops import deferred


# A disk that takes no more says one of these; some libraries pass on the words alone.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
FULL_WORDS = re.compile("No space left on device|File too large|Disk quota exceeded|Read-only file system")
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2


class DiskFullError(OSError, ValueError):
    """A disk takes no more; the message names the place."""


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
            "or name another place; what was being written was taken away."
        ) from error


@contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Makes the folders in which a path is to be; those that it made and that stay empty go again on any error."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:  # the innermost first
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def locked(folder: Path, seconds: float = 2.0) -> Iterator[None]:
    """
    Has a folder for this process alone, among those that ask for it; only for moments.

    Whoever does not get it goes on without, as a person may hold it for a whole command: after `seconds` in which
    nothing came into the folder or left it, and after thirty times as many in any case.
    """
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl  # which not every system has

            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)  # which lets it go
            start = moved = time.monotonic()
            seen = os.fstat(descriptor).st_mtime_ns
            while (now := time.monotonic()) - moved < seconds and now - start < 30 * seconds:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.01)
                if (stamp := os.fstat(descriptor).st_mtime_ns) != seen:  # others like this one have their turns
                    seen, moved = stamp, time.monotonic()
        yield


def check_writable(path: Path, argument: str) -> None:
    """A `ValueError` if no file can be made where a path is to be, by making one that goes at once."""
    place = Path(os.path.realpath(path))
    probe = temporary_sibling(
        next(folder for folder in (place.parent, *place.parents) if folder.is_dir()) / place.name
    )
    try:
        with deferred():
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise ValueError(
            f"`{argument}` must be a place that can be written to, got {str(path)[:200]!r}: {error.strerror}. Name "
            "another."
        ) from error


def temporary_sibling(output: Path, kind: str = "partial", mark: str = "") -> Path:
    """
    A name beside `output`, on the same file system, that nothing else uses and that says which process made it; with a
    `mark` of hexadecimal digits, 8 or 16, instead of random ones.
    """
    return output.parent / f".{output.name}.{here()}-{os.getpid()}-{mark or uuid.uuid4().hex[:8]}.{kind}"


def here() -> str:
    """This machine, and the space in which its processes have their numbers: containers have their own."""
    with suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def leftover_kind(path: Path, output: str, kinds: str) -> str | None:
    """
    Which kind of [`temporary_sibling`] a process of this machine that is gone has made; `None` if none has.

    Args:
        path (`Path`): what may be one.
        output (`str`), kinds (`str`): regular expressions of the name that it stands beside, and of the kinds.
    """
    made_here = rf"\.({output})\.{re.escape(here())}-(?P<pid>\d+)-([0-9a-f]{{8}}){{1,2}}\.(?P<kind>{kinds})"
    match = re.fullmatch(made_here, path.name)
    return None if match is None or _lives(int(match["pid"])) else match["kind"]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def give_name(temporary: Path, path: Path) -> None:
    """Give a file or folder a name; a `FileExistsError` if anything but an empty folder has it."""
    try:
        if temporary.is_dir() and not temporary.is_symlink():
            temporary.rename(path)
            return
        if _rename(temporary, path, RENAME_NOREPLACE):
            return
        os.link(temporary, path)
        temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        if os.path.lexists(path) and error.errno != errno.EBUSY:
            raise FileExistsError(path) from error
        if temporary.is_dir():
            raise
        temporary.rename(path)  # not every file system has links


def exchange(a: Path, b: Path) -> None:
    """Exchange the names of a [`temporary_sibling`] of a file or folder and of that, in one step where that can be."""
    if _rename(a, b, RENAME_EXCHANGE):
        return
    aside = a.with_suffix(".moved")
    b.rename(aside)
    try:
        give_name(a, b)
    except OSError:
        aside.rename(b)
        raise
    aside.rename(a)


def _rename(a: Path, b: Path, flag: int) -> bool:
    """Linux's `renameat2`; `False` where it cannot do this, and a `FileExistsError` where `b` is there already."""
    with suppress(AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), flag) == 0:
            return True
        if ctypes.get_errno() == errno.EEXIST:
            raise FileExistsError(b)
    return False
