"""An output folder that appears complete or not at all."""

import shutil
import uuid
from pathlib import Path


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


def temporary_sibling(output: Path) -> Path:
    """A folder name beside `output`, on the same file system, that nothing else uses."""
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
