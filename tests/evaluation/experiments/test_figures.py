"""Figures of the documentation are those of the results beside them."""

import dataclasses
import importlib
import json
import multiprocessing
import re
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from evaluation.experiments import compare, group_words, merging
from rigpt_hf.pictures.style import encoded
from rigpt_hf.symmetry.merging import LossPath
from tests.test_docs import PAGES, ROOT, lines_of


DRAWN = "--picture docs/figures/"
LINES = [line for page in PAGES for line in lines_of(page) if line.startswith("python -m ") and DRAWN in line]
PINNED = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
pytestmark = pytest.mark.skipif(
    PINNED is None or version("matplotlib") != PINNED[1], reason="another Matplotlib draws"
)


@pytest.fixture(scope="module")
def fresh():
    """A process of its own: in one that had run other tests, three figures of several panels once had other bytes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def drawn_again(line: str, folder: Path) -> tuple[int, dict[Path, Path]]:
    """The exit code of a command of a page that may not train, and what it wrote beside what the page names."""
    module, *words = shlex.split(line)[2:]
    module, written = importlib.import_module(module), {}
    for flag, place in (("--output", "evaluation/results"), ("--picture", "docs/figures")):
        index = words.index(flag) + 1
        path = ROOT / words[index]
        assert path.parent == ROOT / place
        words[index], written[path] = str(folder / path.name), folder / path.name
        if flag == "--output":
            shutil.copy(path, folder)

    def train(*args):
        raise AssertionError("a run is not among the results")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_one", train)
        if hasattr(module, "corpus"):
            patch.setattr(module, "corpus", lambda count: [])
        return module.main(words), written


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition(DRAWN)[2].split()[0])
def test_a_command_of_a_page_has_nothing_left_to_train_and_draws_the_figure_again(line, fresh, tmp_path):
    code, written = fresh.submit(drawn_again, line, tmp_path).result()
    assert code == 0 and len(written) == 2
    for there, here in written.items():
        assert here.read_bytes() == there.read_bytes()


def read(name: str) -> dict:
    return json.loads((ROOT / f"evaluation/results/{name}.json").read_text())


def merged() -> bytes:
    names = {field.name for field in dataclasses.fields(LossPath) if field.init}
    pairs = [pair["path"] for pair in read("merging")["pairs"]]
    return encoded(merging.drawn([LossPath(**{key: pair[key] for key in names & {*pair}}) for pair in pairs]))


def grouped() -> bytes:
    results = read("group_words")
    known = {field.name for field in dataclasses.fields(group_words.Options)}
    return encoded(
        group_words.plot(results, group_words.Options(**{k: v for k, v in results["options"].items() if k in known}))
    )


def compared() -> bytes:
    """Of the candidates that have a name in pictures."""
    results = read("compare")["results"]
    return encoded(compare.draw({name: results[name] for name in compare.LABELS}))


FIGURES = {
    "merging": merged,
    "group-words": grouped,
    "comparison": compared,
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_from_the_results(name, fresh):
    assert fresh.submit(FIGURES[name]).result() == (ROOT / f"docs/figures/{name}.png").read_bytes()
