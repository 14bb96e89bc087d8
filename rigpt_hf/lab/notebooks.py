"""
The notebooks of the course, made from its scripts: `python -m rigpt_hf.lab.notebooks`, or with `--check` only told
whether they are up to date.

A script in percent format is what people edit, and what a diff shows. The notebook holds the same cells and no
outputs, so that it changes only where its script does. Cells are named by what is in them.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from rigpt_hf.checkpoints.folder import write_text
from rigpt_hf.checkpoints.written import look
from rigpt_hf.extras import needs

from ..terminal import Console
from .registry import chapters


METADATA = {
    # With the extension of Jupytext an edit of either of the two becomes one of the other.
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def to_notebook(script: Path) -> Any:
    """
    The notebook of a script in percent format, as an nbformat node.

    Raises:
        MissingPackage: if Jupytext is not installed.
    """
    with needs("course"):
        import jupytext
        import nbformat

    notebook = jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        # In a script two blank lines stand before a function; a cell begins with it.
        cell.source = cell.source.strip("\n")
        name = name_of(cell)
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    return notebook


def name_of(cell: Any) -> str:
    """The name of a cell by what is in it."""
    return hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]


def is_as_made(notebook: Path) -> bool:
    """Whether a notebook is as it was made of some script: nobody has run it, or changed what is in its cells."""
    import nbformat

    cells = nbformat.reads(notebook.read_text(encoding="utf-8"), 4).cells
    return not any(cell.get("outputs") or cell.id.partition("-")[0] != name_of(cell) for cell in cells)


def to_text(script: Path) -> str:
    """The text of the notebook of a script."""
    import nbformat

    return nbformat.writes(to_notebook(script)) + "\n"


def outdated() -> list[Path]:
    """The notebooks that are missing, or not what their scripts give."""
    notebooks = []
    for script in chapters():
        notebook = script.with_suffix(".ipynb")
        if not notebook.is_file() or notebook.read_text(encoding="utf-8") != to_text(script):
            notebooks.append(notebook)
    return notebooks


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a notebook is outdated.")
    ] = False,
):
    """Make the notebooks of the course from its scripts."""
    console = Console(soft_wrap=True)
    stale = outdated()
    if not stale:
        console.print(f"All {len(chapters())} notebooks are those of their scripts.")
        return
    if check:
        names = ", ".join(notebook.name for notebook in stale)
        console.print(f"Not those of their scripts: {names}. Run `python -m rigpt_hf.lab.notebooks`.")
        raise typer.Exit(1)
    if worked_in := [notebook for notebook in stale if notebook.exists() and not is_as_made(notebook)]:
        names = ", ".join(notebook.name for notebook in worked_in)
        console.print(f"Left as they are: {names}, in which somebody has worked. Move them away, and call this again.")
        raise typer.Exit(1)
    for notebook in stale:
        write_text(notebook, to_text(notebook.with_suffix(".py")), seen=look(notebook))
        console.print(f"Written: {notebook}")


if __name__ == "__main__":
    typer.run(main)
