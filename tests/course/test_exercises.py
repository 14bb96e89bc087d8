"""Each chapter ends with three exercises, and the solution of each is a cell that ran and asserts what it computed."""

import ast
import copy
import re
from itertools import pairwise

import nbformat
import pytest

from rigpt_hf.lab.registry import chapters


SCRIPTS = chapters()
NUMBERS = ["1", "2", "3"]


def asserts(cell) -> bool:
    """Whether a cell ran and asserts something that has a name, at its top level, where nothing can skip it."""
    tests = [node.test for node in ast.parse(cell.source).body if isinstance(node, ast.Assert)]
    named = any(isinstance(node, ast.Name) for test in tests for node in ast.walk(test))
    return named and cell.execution_count is not None


def place_of_exercises(cells: list) -> int:
    (place,) = (index for index, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    return place


def computed(cells: list) -> dict[str, list]:
    """The code cells of each solution, by its number."""
    found: dict[str, list] = {}
    for text, code in pairwise(cells[place_of_exercises(cells) + 1 :]):
        solution = re.match(r"Solution (\d+) ", text.source)
        if solution and text.cell_type == "markdown" and code.cell_type == "code":
            found.setdefault(solution[1], []).append(code)
    return found


def faults(cells: list) -> list[str]:
    """What a chapter lacks in its exercises, in words; empty if nothing."""
    asked, _, answered = cells[place_of_exercises(cells)].source.partition("<summary>Solutions</summary>")
    solutions = computed(cells)
    numbers = {
        "asked": re.findall(r"^(\d+)\. ", asked, re.MULTILINE),
        "answered": re.findall(r"^(\d+)\. ", answered, re.MULTILINE),
        "computed": list(solutions),
    }
    wrong = [f"{kind}: {there}" for kind, there in numbers.items() if there != NUMBERS]
    return wrong + [f"{name} asserts nothing" for name, code in solutions.items() if not any(map(asserts, code))]


def cells_of(script) -> list:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_chapter_has_three_exercises_with_solutions_that_assert(script):
    assert faults(cells_of(script)) == []


def without_assert(cells: list) -> None:
    for cell in computed(cells)["2"]:
        tree = ast.parse(cell.source)
        tree.body = [node for node in tree.body if not isinstance(node, ast.Assert)]
        cell.source = ast.unparse(tree)


def in_a_function(cells: list) -> None:
    for cell in computed(cells)["2"]:
        cell.source = "def never_called():\n" + "\n".join(f"    {line}" for line in cell.source.splitlines())


def of_a_constant(cells: list) -> None:
    without_assert(cells)
    computed(cells)["2"][0].source += "\nassert 1 < 2"


def never_run(cells: list) -> None:
    for cell in computed(cells)["2"]:
        cell.execution_count = None


def without_code(cells: list) -> None:
    for cell in computed(cells)["2"]:
        cells.remove(cell)


def with_a_fourth(cells: list) -> None:
    exercises = cells[place_of_exercises(cells)]
    exercises.source = exercises.source.replace("\n\n<details>", "\n4. And why?\n\n<details>")


def without_an_answer(cells: list) -> None:
    exercises = cells[place_of_exercises(cells)]
    asked, mark, answered = exercises.source.partition("<summary>Solutions</summary>")
    exercises.source = asked + mark + answered.replace("\n3. ", "\n")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without_assert, "2 asserts nothing"),
        (in_a_function, "2 asserts nothing"),
        (of_a_constant, "2 asserts nothing"),
        (never_run, "2 asserts nothing"),
        (without_code, "computed: ['1', '3']"),
        (with_a_fourth, "asked: ['1', '2', '3', '4']"),
        (without_an_answer, "answered: ['1', '2']"),
    ],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_a_chapter_that_lacks_something_is_noticed(change, fault):
    cells = copy.deepcopy(cells_of(SCRIPTS[0]))
    change(cells)
    assert faults(cells) == [fault]
