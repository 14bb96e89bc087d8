"""The notebook beside a published model, cell by cell."""

import ast
import re

import nbformat

from rigpt_hf.publishing.notebook import NOTEBOOK, notebook
from rigpt_hf.publishing.repository import repository_files


def run(source: str, names: dict) -> object:
    """What the last line of a cell gives."""
    *lines, last = ast.parse(source).body
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_every_cell_runs(folder):
    made = nbformat.reads(notebook(str(folder)).decode(), as_version=4)
    nbformat.validate(made)
    install, *cells = [cell.source for cell in made.cells if cell.cell_type == "code"]
    assert re.fullmatch(r'%pip install -q "rigpt-hf.+"', install)
    names: dict = {}
    parameters, text, moved = (run(cell, names) for cell in cells)
    assert parameters == f"{names['model'].num_parameters():,} parameters"
    assert isinstance(text, str) and text
    numbers = re.search(r"moved by ([\d.]+) of their norm, the logits by (\S+) of the largest", moved)
    assert float(numbers[1]) > 0.5 and float(numbers[2]) < 2e-5


def test_it_goes_along_where_there_is_a_tokenizer(folder):
    made = {file.path: file for file in repository_files(folder, repo_id="tiny", check_loading=False).files}
    assert "REPO = 'tiny'" in made[NOTEBOOK].read().decode()
    fitted = repository_files(folder, repo_id="tiny", check_loading=False).for_repository("me/tiny")
    text = next(file for file in fitted.files if file.path == NOTEBOOK).read().decode()
    assert "REPO = 'me/tiny'" in text and "REPO = 'tiny'" not in text
    assert "Gauge" in text and "Gauge" not in notebook("me/tiny", turns=False).decode(), "codes cannot be turned"
    (folder / NOTEBOOK).write_text("{}")
    own = repository_files(folder, repo_id="tiny", check_loading=False).for_repository("me/tiny")
    assert next(file for file in own.files if file.path == NOTEBOOK).read() == b"{}", "a person's own stays"
    (folder / NOTEBOOK).unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert NOTEBOOK not in {file.path for file in repository_files(folder, check_loading=False).files}
