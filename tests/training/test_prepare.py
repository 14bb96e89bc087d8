"""Making the data of a run from the command line: a plain book, one process before many, and mistakes in options."""

import json
import random
import re

import pytest

from rigpt_hf.training import pretrain
from rigpt_hf.training.data import Manifest, TokenShards
from rigpt_hf.training.options import PRESETS, find_preset, parse_options


WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "thought", "of", "bones", "while", "no", "dog")
CUT = json.dumps({"separator": "\n\n"})


@pytest.fixture
def book(tmp_path):
    """300 paragraphs of two lines each, in one file."""
    draw = random.Random(0)
    paragraphs = ("\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(2)) for _ in range(300))
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture
def words(book, tmp_path):
    """A command line for a few quick steps on the book, and more options."""

    def make(**more) -> list[str]:
        model = {"hidden_size": 16, "embedding_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        values = {
            "model.config": json.dumps(model),
            "data.source": book,
            "data.path": tmp_path / "data",
            "data.tokenizer": "train:300",
            "data.context": 16,
            "data.validation": 0.1,
            "optimizer.warmup": 1,
            "run.output": tmp_path / "run",
            "run.steps": 4,
            "run.batch_size": 4,
            "run.evaluate_batches": 2,
            "run.trackers": "[]",
        }
        values |= {name.replace("__", "."): value for name, value in more.items()}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return make


def refused(capsys, words: list[str]) -> str:
    """The one line that the program ends with."""
    assert pretrain.main(words) == 2
    shown = capsys.readouterr().err
    *_, line = shown.splitlines()
    assert line.startswith("pretrain: ")
    return line


def test_a_plain_book_trains_when_it_is_cut(words, tmp_path):
    assert pretrain.main(words(data__source_options=CUT)) == 0
    splits = Manifest.read(tmp_path / "data").splits
    documents = {name: split.documents for name, split in splits.items()}
    assert sum(documents.values()) == 300 and 10 <= documents["validation"] <= 60
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 4 and log[-1]["validation_loss"] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("share", [0.1, 1 - 1e-12], ids=["none held out", "all held out"])
def test_a_plain_book_is_refused_whole_and_leaves_nothing(words, tmp_path, capsys, share):
    line = refused(capsys, words(data__validation=share))
    rule = "hold out some documents" if share == 0.1 else "leave some documents to train on"
    assert f"`validation` must {rule}, got {share}" in line
    assert r'`source_options: {separator: "\n\n"}` makes one of each paragraph of a text file' in line
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"], "the next run would find what is left"
    # What the line says is all that is missing.
    assert pretrain.main(words(data__source_options=CUT, run__prepare_only="true")) == 0


def test_data_are_made_before_the_run(words, tmp_path, capsys):
    ready = {"data__source_options": CUT, "run__prepare_only": "true"}
    for _ in range(2):  # made, and found
        assert pretrain.main(words(**ready)) == 0
        train, held_out = (len(TokenShards(tmp_path / "data", split)) for split in ("train", "validation"))
        assert train > 5 * held_out > 0
        expected = f"{train:,} tokens to train on and {held_out:,} held out are in {tmp_path / 'data'}\n"
        assert capsys.readouterr().out == expected
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "data"}, "no run has begun"
    made = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    assert pretrain.main(words(data__source_options=CUT)) == 0
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == made
    assert (tmp_path / "run" / "model").is_dir()


def test_data_that_a_run_could_not_begin_with_are_named_before_it(words, tmp_path, capsys, monkeypatch):
    ready = {"data__source_options": CUT, "run__prepare_only": "true"}
    line = refused(capsys, words(**ready, run__batch_size=5000))
    assert "`batch_size` must be at most the " in line and "hold out more in a new folder" in line
    assert "`context` must be from 2 to the" in refused(capsys, words(**ready, data__context=1_000_000))
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(capsys, words(**ready, data__path=tmp_path / "other"))
    assert "`run.prepare_only` must have one process, got 2. Start it with `python`" in line
    assert not (tmp_path / "other").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pretrain.main(words(**ready, data__path=tmp_path / "other")) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"text-column": "text"},
            "must be among text_column, split, name, revision, separator, megabytes, got 'text-c",
        ),
        ({"force": True}, "must be among text_column, .* got 'force'"),
        ({"separator": 5}, "must have text as separator, got 5"),
        ({"megabytes": "many"}, "must have a number as megabytes, got 'many'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options_of_a_source(words, tmp_path, capsys, wrong, message):
    line = refused(capsys, words(data__source_options=json.dumps(wrong), run__prepare_only="true"))
    assert line.startswith("pretrain: `data.source_options` ")
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_options_of_a_source_that_are_right(words):
    right = {"text_column": "body", "revision": None, "megabytes": 1, "separator": "\n\n"}
    assert pretrain.main(words(data__source_options=json.dumps(right), run__prepare_only="true")) == 0


def test_presets_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smoke = str(PRESETS / "smoke.yaml")
    for name in ("smoke", "smoke.yaml", "presets/smoke", "presets/smoke.yaml"):
        assert find_preset(name) == smoke
        assert parse_options(["--config", name]) == parse_options([f"--config={smoke}"])
    assert parse_options(["--config=smoke", "--run.steps", "77"]).run.steps == 77
    (tmp_path / "smoke").mkdir()
    assert find_preset("smoke") == smoke
    # A file of one's own comes first, and what is no preset stays what it is.
    (tmp_path / "smoke.yaml").write_text("run: {steps: 99}\n")
    assert parse_options(["--config", "smoke.yaml"]).run.steps == 99
    assert parse_options(["--config", "run: {steps: 98}" + " " * 5000]).run.steps == 98
    for name in ("none", "./tiny-docs", "other/tiny-docs.yaml", "tiny-docs.yml", str(tmp_path / "tiny-docs.yaml")):
        assert find_preset(name) == name
    with pytest.raises(ValueError, match="config.*none.*Try --help"):
        parse_options(["--config", "none"])


def test_the_help_names_the_presets(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    names = [path.stem for path in PRESETS.glob("*.yaml")]
    assert len(names) >= 7
    assert f"or the name of a preset: {', '.join(sorted(names))}." in shown.replace("- ", "-")
    assert "--run.prepare_only" in shown
