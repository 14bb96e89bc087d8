"""Leftovers of killed processes under temporary names, and how they go."""

import functools
import logging
import os
import re
import shutil
from pathlib import Path

from ..stops import deferred
from .disk import leftover_kind
from .written import WRITTEN, fingerprint, foreign


logger = logging.getLogger(__name__)


@functools.cache
def _tell_once(text: str) -> None:
    logger.warning(text)


def remove_leftovers(output: Path) -> None:
    """
    Remove, and name, what killed processes of this machine have left beside `output`.

    What was there before has the name of a "previous" or "moved" one while it changes places with the new, and may be
    somebody's who put it there meanwhile: it goes only if it is one of the two that the name tells of, and is put back
    where nothing is.
    """
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        kind = leftover_kind(path, re.escape(output.name), "partial|previous|moved")
        if kind is None:
            continue
        if kind != "partial" and not os.path.lexists(output):
            path.rename(output)
            logger.warning(f"Put back {str(output)!r}, which a killed run had moved aside.")
        elif kind != "partial" and not _is_expected(path):
            _tell_once(f"{str(path)!r} is what was at {str(output)!r} when a run was killed; it is left.")
        elif discard(path):
            logger.warning(f"Removed {str(path)!r}, which a killed run had left.")


def _is_expected(path: Path) -> bool:
    marks = path.name.rpartition("-")[2].partition(".")[0]
    return fingerprint(path) in (marks[:8], marks[8:])


def discard(path: Path) -> bool:
    """Remove what was made under a temporary name, unless files of others were moved there; whether it is gone."""
    with deferred():
        if (path / WRITTEN).exists() and foreign(path):
            _tell_once(f"{str(path)!r} has files of others that were moved there; it is left.")
            return False
        remove(path)
    return True


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
