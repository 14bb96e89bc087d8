"""The course: every notebook runs, in a kernel of its own, and is the one that its script gives."""

import ast
import itertools
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import typer
from nbclient.exceptions import CellExecutionError
from typer.testing import CliRunner

from rigpt_hf.lab import notebooks
from rigpt_hf.lab.notebooks import outdated, run_cells, to_notebook
from rigpt_hf.lab.registry import LABS, chapters, course_folder, figure_names, script_of
from tests.processes import run


SCRIPTS = chapters()
STREAMS = ("stdout", "stderr")
# Chapters whose time goes into training, and little of it into the library.
TRAINED = ("1_gpt", "4_charges", "5_basis", "6_neural_ode", "7_symmetry")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command that makes notebooks, on a course of one chapter in a folder of the test's own."""
    import typer

    script = tmp_path / "1_short.py"
    script.write_text("# %% [markdown]\n# A line.\n\n# %%\nprint(1)\n", encoding="utf-8")
    monkeypatch.setattr(notebooks, "chapters", lambda: [script])
    app = typer.Typer()
    app.command()(notebooks.main)
    return script, lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def quick(monkeypatch):
    """Cells give the time of day in the place of what they would print, which a kernel takes seconds for."""
    calls = itertools.count()

    def give(notebook, folder):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [nbformat.v4.new_output("stream", name=name, text=f"{next(calls)}") for name in STREAMS]
        return notebook

    monkeypatch.setattr(notebooks, "run_cells", give)


def names_of(script: Path) -> list[str]:
    return figure_names(next(lab for lab in LABS.values() if lab.chapter == script.stem))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.stem not in TRAINED], ids=lambda s: s.stem)
def test_chapter_runs_as_a_program(script, tmp_path):
    done = run(script, cwd=tmp_path, MPLBACKEND="agg")
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert len(names_of(script)) in (1, 2, 3) and all(f"[{name}] " in done.stdout for name in names_of(script))
    assert sorted(tmp_path.iterdir()) == [], "a chapter writes no files"


@pytest.mark.full
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebook_runs_and_shows_its_figures(script, tmp_path):
    notebook = run_cells(nbformat.read(script.with_suffix(".ipynb"), as_version=4), tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == len(names_of(script))
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    for name in names_of(script):
        assert f"[{name}] " in printed
    warnings = [output.text for output in outputs if output.get("name") == "stderr"]
    # Without the package for widgets, which nothing here needs, tqdm says so when it is imported.
    complaints = [text for text in warnings if "IProgress not found" not in text]
    assert not complaints, "a reader would wonder about warnings"
    assert sorted(tmp_path.iterdir()) == [], "a chapter writes no files"


def test_a_false_claim_stops_a_notebook(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'not so'")])
    with pytest.raises(CellExecutionError, match="not so"):
        run_cells(notebook, tmp_path)


def test_there_are_seven_chapters_each_a_lab():
    assert [script.name[0] for script in SCRIPTS] == list("1234567")
    assert [lab.chapter for lab in LABS.values() if lab.chapter] == [script.stem for script in SCRIPTS]
    listed = (course_folder() / "README.md").read_text(encoding="utf-8")
    for name, lab in LABS.items():
        if lab.chapter:
            assert f"({lab.chapter}.ipynb)" in listed and f"`rigpt lab {name}`" in listed
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", listed):
        assert (course_folder() / picture).is_file()


def test_notebooks_are_those_of_their_scripts():
    assert SCRIPTS and outdated() == []


def test_a_notebook_in_which_somebody_worked_is_left(quick, tmp_path, monkeypatch, capsys):
    script = shutil.copy(notebooks.chapters()[0], tmp_path)
    notebook = Path(script).with_suffix(".ipynb")
    monkeypatch.setattr(notebooks, "chapters", lambda: [Path(script)])
    notebooks.main(check=False)
    made = json.loads(notebook.read_text())
    Path(script).write_text(Path(script).read_text() + "\n# %% [markdown]\n# More.\n")
    for change in ({"source": ["mine"]}, {"outputs": [{"output_type": "stream", "name": "stdout", "text": ["mine"]}]}):
        cell = next(cell for cell in made["cells"] if cell["cell_type"] == "code")
        theirs = json.dumps(made | {"cells": [cell | change if one is cell else one for one in made["cells"]]})
        notebook.write_text(theirs)
        with pytest.raises(typer.Exit):
            notebooks.main(check=False)
        assert notebook.read_text() == theirs and "in which somebody has worked" in capsys.readouterr().out
    notebook.write_text(json.dumps(made))
    notebooks.main(check=False)
    assert notebooks.outdated() == [] and "More." in notebook.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebooks_hold_what_their_cells_print_and_draw(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells) > 10
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(names_of(script))
    printed = "".join(output.get("text", "") for output in outputs)
    assert all(f"[{name}] " in printed for name in names_of(script))
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert "/home/" not in str(outputs) and "/tmp" not in str(outputs), "places on a machine"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_no_code_is_without_its_text(script):
    cells = to_notebook(script).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith(f"# {script.name[0]}. ")
    code = [index for index, cell in enumerate(cells) if cell.cell_type == "code"]
    assert len(code) > 5
    for index in code:
        assert cells[index - 1].cell_type == "markdown", f"no text before:\n{cells[index].source[:200]}"
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for heading in ("## What we saw", "## Exercises", "<summary>Solutions</summary>", "## Further reading"):
        assert text.count(heading) == 1
    assert "$$" in text or script.stem == "1_gpt"
    # An odd number of dollars is a formula that no reader sees as one.
    for paragraph in re.split(r"\n\s*\n", text):
        assert paragraph.replace(r"\$", "").count("$") % 2 == 0, paragraph


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_we_saw_is_computed_not_typed(script):
    cells = to_notebook(script).cells
    place = next(index for index, cell in enumerate(cells) if cell.source.startswith("## What we saw"))
    assert cells[place].source == "## What we saw"
    tree = ast.parse(cells[place + 1].source)
    printed = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
    assert len(printed) >= 3
    for call in printed:
        assert isinstance(call.args[0], ast.JoinedStr)
        # No number but those that are formatted, names of layers and steps aside.
        typed = "".join(part.value for part in call.args[0].values if isinstance(part, ast.Constant))
        assert not re.search(r"\d\.\d|\d%|\de-", typed), typed
    source = script.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*assert ", source, re.MULTILINE)) >= 8, "claims are checked"


def test_the_gpt_and_its_training_are_a_hundred_lines():
    tree = ast.parse(script_of(LABS["gpt"]).read_text(encoding="utf-8"))
    parts = ("Attention", "Block", "GPT", "windows", "loss_of", "trained")
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert sum(found[part].end_lineno - found[part].lineno + 1 for part in parts) <= 100


def test_the_command_writes_checks_and_rewrites(quick, command):
    script, run = command
    notebook = script.with_suffix(".ipynb")
    missing = run("--check")
    assert missing.exit_code == 1 and "1_short.ipynb" in missing.output and not notebook.exists()
    assert run().exit_code == 0
    (cell,) = (cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code")
    assert (cell.source, [output.name for output in cell.outputs]) == ("print(1)", ["stdout"])
    assert run("--check").exit_code == 0
    script.write_text(script.read_text(encoding="utf-8") + "print(2)\n", encoding="utf-8")
    changed = run("--check")
    assert changed.exit_code == 1 and "Run `python -m rigpt_hf.lab.notebooks`" in changed.output
    assert run().exit_code == 0 and "print(2)" in notebook.read_text(encoding="utf-8")
    assert sorted(path.name for path in script.parent.iterdir()) == ["1_short.ipynb", "1_short.py"]


def test_an_edited_cell_changes_one_cell(command):
    script, _ = command
    before = to_notebook(script)
    script.write_text(script.read_text(encoding="utf-8").replace("A line.", "Another line."), encoding="utf-8")
    after = to_notebook(script)
    assert before.cells[0].id != after.cells[0].id and before.cells[1] == after.cells[1]
