"""Runs that are made again: the same where nothing changed, and named where they are not."""

import json
import shlex

import pytest

from evaluation.experiments import again
from evaluation.experiments.run_records import DIGEST
from evaluation.experiments.symmetry import blocks, chorales, found, modular, scan, words
from rigpt_hf.checkpoints.written import json_sha256
from rigpt_hf.terminal import Console
from tests.test_docs import PAGES, ROOT, lines_of


SMALL = {"steps": 2, "hidden_size": 16, "layers": 1, "heads": 1, "seeds": 2}
NOTES = [(n / 4, 60 + (n * k) % 7) for k in (1, 3) for n in range(12)]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(chorales, "corpus", lambda count: [NOTES] * 10)
    monkeypatch.setattr(found, "MEASUREMENTS", 1)
    monkeypatch.setattr(chorales, "MEASUREMENTS", 1)
    made = {
        "scan": lambda out: scan.run(
            scan.Options(**SMALL, longest=4, splits=["add-jump", "around-right"], only="RiGPT, verbs", output=out)
        ),
        "words": lambda out: words.run(
            words.Options(**SMALL, length=2, longer=3, groups=["S3"], only="RiGPT;RiGPT, symmetry", output=out)
        ),
        "modular": lambda out: modular.run(
            modular.Options(**SMALL, prime=5, tasks=["sums"], shares=[0.4, 0.2], only="RiGPT", output=out)
        ),
        "chorales": lambda out: chorales.run(
            chorales.Options(**SMALL, window=8, batch=2, chorales=10, only="RiGPT", output=out)
        ),
        "found": lambda out: found.run(
            found.Options(**SMALL | {"steps": 64}, length=2, groups=["S3"], only="RiGPT", output=out)
        ),
    }

    def make(name):
        path = tmp_path / f"{name}.json"
        made[name](path)
        return path

    return make


def told(path, output, *, only=""):
    console = Console(record=True, width=160)
    made = again.run(again.Options(path, output, only), console)
    return made, console.export_text()


def changed(path, by):
    """A file of runs in which every number that is asked for is another, signed as the program signs it."""
    content = json.loads(path.read_text())
    for run in content["runs"]:
        del run[DIGEST]
        run["test_accuracy"] += by
        run[DIGEST] = json_sha256(run)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", again.EXPERIMENTS)
def test_a_run_is_the_same_again(name, results, tmp_path):
    path = results(name)
    rows = again.rows_of(again.read_runs(path, "results")[1], [*again.EXPERIMENTS[name].options, "learner"])
    made, text = told(path, tmp_path / "again.json")
    assert len(made) == len(rows) == {"scan": 2, "words": 2, "modular": 2}.get(name, 1)
    assert text.count(" yes") == len(rows)
    value = again.EXPERIMENTS[name].value
    assert [value(run) for run in made] == [value(row[0]) for row in rows.values()]
    assert all(row[0]["seed"] == 0 and len(row) == 2 for row in rows.values())


def test_another_number_is_named(results, tmp_path):
    path = results("scan")
    changed(path, 0.5)
    _, text = told(path, tmp_path / "again.json")
    assert " yes" not in text and text.count("-0.5000") == 2


def test_a_row_alone_and_nothing_twice(results, tmp_path, monkeypatch):
    path = results("scan")
    made, _ = told(path, tmp_path / "again.json", only="around")
    assert [run["split"] for run in made] == ["around-right"]
    monkeypatch.setattr(scan, "run_one", lambda *_: pytest.fail("made twice"))
    assert told(path, tmp_path / "again.json", only="around")[0] == made


def test_what_has_no_rows_is_refused(results, tmp_path):
    path = results("scan")
    with pytest.raises(
        ValueError, match="`only` must begin the name of a row, got 'left'. Rows: add-jump, RiGPT, verbs"
    ):
        told(path, tmp_path / "again.json", only="left")
    blocks.RunRecords(tmp_path / "blocks.json", "blocks", {}).run(lambda: {"seconds": 1.0}, seed=0)
    with pytest.raises(ValueError, match="`results` must be runs of scan, words"):
        told(tmp_path / "blocks.json", tmp_path / "again.json")


LINES = [
    line for page in PAGES for line in lines_of(page) if line.startswith("python -m evaluation.experiments.again")
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition("results/")[2])
def test_what_a_page_says_was_made_again_was(line, tmp_path, monkeypatch):
    """Its command has nothing left to train."""
    words_of = shlex.split(line)[3:]
    output = ROOT / words_of[words_of.index("--output") + 1]
    kept = tmp_path / output.name
    kept.write_bytes(output.read_bytes())
    words_of[words_of.index("--output") + 1] = str(kept)
    for each in (scan, words, modular, chorales, found):
        monkeypatch.setattr(each, "run_one", lambda *_: pytest.fail("a run is not among the results"))
    monkeypatch.chdir(ROOT)
    assert again.main(words_of) == 0
    assert kept.read_bytes() == output.read_bytes()
