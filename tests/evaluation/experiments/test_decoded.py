"""Documents from token ids: what the tokenizer made them of, and nothing overwritten."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from evaluation.experiments import decoded
from tests.evaluation.toys import word_tokenizer


WORDS = ["<end>", *(f" {letter}{index}" for letter in "abc" for index in range(10))]


@pytest.fixture
def row(tmp_path):
    ids = np.random.default_rng(0).integers(1, len(WORDS), 23)
    ids.astype("<u2").tofile(tmp_path / "row.bin")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "tokenizer")
    return ids


def run(tmp_path, *more):
    app = typer.Typer()
    app.command()(decoded.main)
    given = {"tokens": "row.bin", "tokenizer": "tokenizer", "output": "out.jsonl"}
    arguments = [each for name, file in given.items() for each in (f"--{name}", str(tmp_path / file))]
    return CliRunner().invoke(app, [*arguments, *more], env={"COLUMNS": "400"})


def test_documents_are_the_text_of_windows(row, tmp_path):
    result = run(tmp_path, "--window", "7")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.split() for line in lines] == [
        [WORDS[index].strip() for index in row[start : start + 7]] for start in (0, 7, 14)
    ]
    assert not list(tmp_path.glob(".*partial"))


def test_what_is_impossible_is_refused_and_nothing_is_lost(row, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    refused = run(tmp_path)
    assert refused.exit_code == 2 and "`output` must not exist yet" in refused.output
    for arguments, message in (
        (("--window", "0"), "`window` must be at least 1, got 0"),
        (("--window", "24", "--force"), "`tokens` must be at least one window of 24, got 23"),
        (("--tokens", str(tmp_path / "none.bin")), "`tokens` must be a file of token ids"),
        (("--tokenizer", str(tmp_path / "none"), "--force"), "`tokenizer` must be the folder"),
    ):
        result = run(tmp_path, *arguments)
        assert result.exit_code == 2 and message in result.output, result.output
    np.array([1, 2, len(WORDS)] * 9, dtype="<u2").tofile(tmp_path / "row.bin")
    assert (
        "`tokenizer` must have made the ids, got 31 tokens and the id 31"
        in run(tmp_path, "--window", "7", "--force").output
    )
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    row.astype("<u2").tofile(tmp_path / "row.bin")
    assert run(tmp_path, "--window", "7", "--force").exit_code == 0
    assert (tmp_path / "out.jsonl").read_text() != "mine"
