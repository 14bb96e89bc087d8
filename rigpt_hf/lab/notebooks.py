"""
The notebooks of the course, made from its scripts: `python -m rigpt_hf.lab.notebooks`, or with `--check` only told
whether they are up to date.

A script in percent format is what people edit, and what a diff shows. The notebook holds the same cells, named by what
is in them, with what they print and draw, so that it can be read where nothing runs.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from rigpt_hf.checkpoints.folder import write_text
from rigpt_hf.checkpoints.written import look
from rigpt_hf.extras import needs

from ..terminal import Console
from .registry import chapters


# Seconds that a cell may take: ten where nothing else runs, far more on a machine that others use too.
LONGEST = 600
# In the metadata of a notebook, the hash of its outputs.
RECORD = "rigpt_outputs"
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


def run_cells(notebook: Any, folder: Path) -> Any:
    """
    A notebook after a kernel of its own ran its cells in a folder.

    Raises:
        CellExecutionError: if one fails.
    """
    from nbclient import NotebookClient

    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=LONGEST, kernel_name="python3", resources=place, record_timing=False)
    return client.execute()


def with_outputs(script: Path) -> Any:
    """The notebook of a script after its cells ran, and a record of what they gave."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = run_cells(to_notebook(script), Path(folder))
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings are those of a machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(METADATA | {RECORD: sum_of(notebook)})
    return notebook


def sum_of(notebook: Any) -> str:
    """A hash of all that the cells gave."""
    given = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def is_as_made(notebook: Path) -> bool:
    """Whether a notebook is as it was made of some script: nobody has run it, or changed what is in its cells."""
    import nbformat

    found = nbformat.reads(notebook.read_text(encoding="utf-8"), 4)
    untouched = all(cell.id.partition("-")[0] == name_of(cell) for cell in found.cells)
    return untouched and found.metadata.get(RECORD) == sum_of(found)


def is_of(notebook: Path, script: Path) -> bool:
    """Whether a notebook has the cells of a script, and what they gave."""
    import nbformat

    found = nbformat.reads(notebook.read_text(encoding="utf-8"), 4)
    given = found.metadata.pop(RECORD, None) == sum_of(found)
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return given and found == to_notebook(script)


def outdated() -> list[Path]:
    """The notebooks that are missing, or not what their scripts give."""
    both = {script.with_suffix(".ipynb"): script for script in chapters()}
    return [notebook for notebook, script in both.items() if not (notebook.is_file() and is_of(notebook, script))]


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
    import nbformat

    for notebook in track(stale, "Running the cells", console=console):
        made = with_outputs(notebook.with_suffix(".py"))
        write_text(notebook, nbformat.writes(made) + "\n", seen=look(notebook))
        console.print(f"Written: {notebook}")


if __name__ == "__main__":
    typer.run(main)
