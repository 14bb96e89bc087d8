"""Figures of the documentation are those of the results beside them."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
from importlib.metadata import version

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


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition(DRAWN)[2].split()[0])
def test_a_command_of_a_page_has_nothing_left_to_train_and_draws_the_figure_again(line, tmp_path, monkeypatch):
    module, *words = shlex.split(line)[2:]
    module = importlib.import_module(module)
    for flag, folder in (("--output", "evaluation/results"), ("--picture", "docs/figures")):
        place = words.index(flag) + 1
        path = ROOT / words[place]
        assert path.parent == ROOT / folder
        words[place] = str(tmp_path / path.name)
        if flag == "--output":
            shutil.copy(path, words[place])
            results = path

    def train(*args):
        raise AssertionError("a run is not among the results")

    monkeypatch.setattr(module, "run_one", train)
    if hasattr(module, "corpus"):
        monkeypatch.setattr(module, "corpus", lambda count: [])
    assert module.main(words) == 0
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / results.name).read_bytes() == results.read_bytes()


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
def test_a_figure_is_drawn_from_the_results(name):
    assert FIGURES[name]() == (ROOT / f"docs/figures/{name}.png").read_bytes()
