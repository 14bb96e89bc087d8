"""What killed processes have left under temporary names, and how it goes."""

import logging
import re
import shutil
from pathlib import Path

from .disk import leftover_kind
from .written import WRITTEN, foreign


logger = logging.getLogger(__name__)


def remove_leftovers(output: Path) -> None:
    """Remove, and name, what killed processes of this machine have left beside `output`; nothing foreign in it."""
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        kind = leftover_kind(path, re.escape(output.name), "partial|previous")
        if kind is None:
            continue
        if kind == "previous" and not output.exists():
            path.rename(output)
            logger.warning(f"Put back {str(output)!r}, which a killed run had moved aside.")
        elif discard(path):
            logger.warning(f"Removed {str(path)!r}, which a killed run had left.")


def discard(path: Path) -> bool:
    """Remove what was made under a temporary name, unless files of others were moved there; whether it is gone."""
    if (path / WRITTEN).exists() and foreign(path):
        logger.warning(f"{str(path)!r} has files of others that were moved there; it is left.")
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return True
