"""A small output folder: how it is made, what is in it, and what a person sees of it."""

from pathlib import Path

from rigpt_hf.checkpoints.folder import check_output, new_folder
from rigpt_hf.checkpoints.written import WRITTEN


def make(output: Path, text: str = "weights", meanwhile=lambda: None) -> None:
    with new_folder(output, check_output(output, None, force=True)) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "model").write_text(text)
        (folder / "config.json").write_text("{}")
        meanwhile()


def content(folder: Path) -> dict[str, str]:
    """Names and text of all files that a person would see, hidden ones too, but the record."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != WRITTEN]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


OURS = {"out/part/model": "weights", "out/config.json": "{}"}
