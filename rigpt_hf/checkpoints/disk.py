"""What the disk has to do with it: full disks, and folders above that are made on the way."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


# A disk that takes no more says one of these; some libraries pass on the words alone.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
FULL_WORDS = re.compile("No space left on device|File too large|Disk quota exceeded|Read-only file system")


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
