"""Making the data of a run from the command line: a plain book, one process before many, and mistakes in options."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from rigpt_hf.training import pretrain
from rigpt_hf.training.data import Manifest, TokenShards
from rigpt_hf.training.options import PRESETS, parse_options


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
            "config_overrides": json.dumps(model),
            "data": book,
            "data_dir": tmp_path / "data",
            "tokenizer": "train:300",
            "context_length": 16,
            "eval_share": 0.1,
            "warmup_steps": 1,
            "output_dir": tmp_path / "run",
            "max_steps": 4,
            "global_batch_size": 4,
            "eval_batches": 2,
            "report_to": "none",
        }
        words = ((f"--{name}", str(value)) for name, value in (values | more).items())
        return [
            "--prepare-only" if word == "--prepare_only" else word for pair in words for word in pair if word != "True"
        ]

    return make


def refused(capsys, words: list[str]) -> str:
    """The one line that the program ends with."""
    assert pretrain.main(words) == 2
    shown = capsys.readouterr().err
    *_, line = shown.splitlines()
    assert line.startswith("pretrain.py: ")
    return line


def test_a_plain_book_trains_when_it_is_cut(words, tmp_path):
    assert pretrain.main(words(data_options=CUT)) == 0
    splits = Manifest.read(tmp_path / "data").splits
    documents = {name: split.documents for name, split in splits.items()}
    assert sum(documents.values()) == 300 and 10 <= documents["validation"] <= 60
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 4 and log[-1]["validation_loss"] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_plain_book_is_refused_whole_and_leaves_nothing(words, tmp_path, capsys):
    for share, rule in ((0.1, "hold out some documents"), (1 - 1e-12, "leave some documents to train on")):
        line = refused(capsys, words(eval_share=share))
        assert f"`--eval-share` must {rule}, got {share}" in line
        assert r'`data_options: {separator: "\n\n"}` makes one of each paragraph of a text file' in line
        assert [path.name for path in tmp_path.iterdir()] == ["book.txt"], "the next run would find what is left"
        # What the line says is all that is missing.
        assert pretrain.main(words(eval_share=0.1, data_options=CUT, prepare_only=True)) == 0
        shutil.rmtree(tmp_path / "data")


def test_data_are_made_before_the_run(words, tmp_path, capsys):
    ready = {"data_options": CUT, "prepare_only": True}
    for _ in range(2):  # made, and found
        assert pretrain.main(words(**ready)) == 0
        train, held_out = (len(TokenShards(tmp_path / "data", split)) for split in ("train", "validation"))
        assert train > 5 * held_out > 0
        expected = f"{train:,} tokens to train on and {held_out:,} held out are in {tmp_path / 'data'}\n"
        said, following = capsys.readouterr().out.splitlines(keepends=True)
        assert said == expected
        assert following.startswith("Next: rigpt pretrain --") and "prepare-only" not in following.replace("_", "-")
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "data"}, "no run has begun"
    made = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    assert pretrain.main(words(data_options=CUT)) == 0
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == made
    assert (tmp_path / "run" / "model").is_dir()


def test_a_full_disk_at_the_first_change_is_said_in_a_line_of_its_own(words, tmp_path, capsys, monkeypatch):
    mkdir = Path.mkdir

    def full(path, *arguments, **options):
        if path.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    assert pretrain.main(words(data_options=CUT, prepare_only=True)) == 2
    said = [line for line in re.split("[\r\n]", capsys.readouterr().err) if "No space left" in line]
    assert len(said) == 1 and "tokens [" not in said[0], said
    assert "`--data-dir` must be a place that can be written to" in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt"}


def test_data_that_a_run_could_not_begin_with_are_named_before_it(words, tmp_path, capsys, monkeypatch):
    ready = {"data_options": CUT, "prepare_only": True}
    line = refused(capsys, words(**ready, global_batch_size=5000))
    assert "`--global-batch-size` must be at most the " in line and "`--eval-batches` at least 1, got " in line
    assert "hold out more, with a larger `--eval-share` in another `--data-dir`" in line
    assert "`--context-length` must be from 2 to the" in refused(capsys, words(**ready, context_length=1_000_000))
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(capsys, words(**ready, data_dir=tmp_path / "other"))
    assert "`--prepare-only` must have one process, got 2. Start it with `python`" in line
    assert not (tmp_path / "other").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pretrain.main(words(**ready, data_dir=tmp_path / "other")) == 0


def test_options_of_a_source(words, tmp_path, capsys):
    for wrong, message in (
        ({"text-column": "t"}, "must be among text_column, split, name, revision, separator, megabytes, got 'text-c"),
        ({"force": True}, "must be among text_column, .* got 'force'"),
        ({"separator": 5}, "must have text as separator, got 5"),
        ({"megabytes": "many"}, "must have a number as megabytes, got 'many'"),
    ):
        line = refused(capsys, words(data_options=json.dumps(wrong), prepare_only=True))
        assert re.match(f"pretrain.py: `--data-options` {message}", line), line
        assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]
    right = {"text_column": "body", "revision": None, "megabytes": 1, "separator": "\n\n"}
    assert pretrain.main(words(data_options=json.dumps(right), prepare_only=True)) == 0


def test_presets_are_found_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    smoke = parse_options(["--config", str(PRESETS / "smoke.yaml")])
    assert all(parse_options(["--config", name]) == smoke for name in ("smoke", "smoke.yaml", "presets/smoke"))
    assert parse_options(["--config=smoke", "--max-steps", "77"]).max_steps == 77
    # A file of one's own comes first.
    (tmp_path / "smoke.yaml").write_text("max_steps: 99\n")
    assert parse_options(["--config", "smoke.yaml"]).max_steps == 99
    with pytest.raises(ValueError, match="`--config` must be a readable YAML file or a preset, got 'none'"):
        parse_options(["--config", "none"])
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    names = [path.stem for path in PRESETS.glob("*.yaml")]
    assert len(names) >= 7 and all(name in shown.replace("- ", "-") for name in names)
    assert "--prepare-only" in shown
