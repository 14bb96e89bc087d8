"""Folders and files that appear complete or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .workers import ALONE, Workers, together


def check_output(output: Path, source: str, force: bool) -> None:
    """
    Raise if an output folder may not be written.

    Args:
        output (`Path`): the folder.
        source (`str`): what is converted into it.
        force (`bool`): whether an earlier model in it may be replaced.

    Raises:
        ValueError: if `output` is a file, holds the source, is not empty without `force`, or would be replaced with
            `force` although it does not look like a saved model.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {str(output)!r}. Name another one.")
    given = Path(source)
    if given.exists() and (given.resolve() == output.resolve() or output.resolve() in given.resolve().parents):
        raise ValueError(f"`output_dir` must not hold the source, got {str(output)!r}. Name another folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise ValueError(
            f"`output_dir` must be empty or absent, got {str(output)!r}, which has files in it. Name another folder, "
            "or pass `force=True` to replace it once the new one is complete."
        )
    if not (output / "config.json").is_file():
        raise ValueError(
            f"`output_dir` can be replaced only if it is a saved model, got {str(output)!r}, which has no "
            "`config.json`. Remove it yourself, or name another folder."
        )


@contextmanager
def new_folder(output: Path, argument: str = "output_dir", workers: Workers = ALONE) -> Iterator[Path]:
    """
    A folder beside `output` to write into; it becomes `output` when the block ends well, and is removed if not.

    Args:
        output (`Path`): where the folder shall appear; an earlier one is replaced at the end.
        argument (`str`, defaults to `"output_dir"`): what error messages call `output`.
        workers (`Workers`, *optional*): the processes that write together; the first makes and publishes the folder.

    Raises:
        ValueError: if nothing can be written there.
    """
    is_main = workers.index == 0
    temporary = workers.gather(temporary_sibling(output))[0]
    try:
        together(workers, lambda: _make(temporary, output, argument) if is_main else None)
        yield temporary
        together(workers, lambda: publish(temporary, output) if is_main else None)
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def _make(folder: Path, output: Path, argument: str) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"`{argument}` must be a place that can be written to, got {str(output)!r}: {error.strerror}. Name "
            "another."
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it becomes `path` when the block ends well, and is removed if not."""
    temporary = temporary_sibling(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete, in the place of an earlier one."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_sibling(output: Path) -> Path:
    """A name beside `output`, on the same file system, that nothing else uses."""
    return output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"


def publish(temporary: Path, output: Path) -> None:
    """Put the finished folder in place of `output`; an earlier one goes last, and comes back if this fails."""
    if not output.exists():
        temporary.rename(output)
        return
    previous = temporary_sibling(output)
    output.rename(previous)
    try:
        temporary.rename(output)
    except OSError:
        previous.rename(output)
        raise
    shutil.rmtree(previous)
