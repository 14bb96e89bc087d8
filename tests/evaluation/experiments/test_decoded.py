"""Documents from token ids: what the tokenizer made them of, and nothing overwritten."""

import json

import numpy as np
import pytest

from evaluation.experiments import decoded
from tests.evaluation.toys import word_tokenizer


WORDS = ["<end>", *(f" {letter}{index}" for letter in "abc" for index in range(10))]


@pytest.fixture
def row(tmp_path):
    ids = np.random.default_rng(0).integers(1, len(WORDS), 23)
    ids.astype("<u2").tofile(tmp_path / "row.bin")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "tokenizer")
    return ids


@pytest.fixture
def run(tmp_path, capsys):
    """The program; returns its exit code and what it says."""

    def program(*more, tokens="row.bin", tokenizer="tokenizer"):
        given = [str(tmp_path / name) for name in (tokens, tokenizer, "out.jsonl")]
        return decoded.main([*given, *more]), "".join(capsys.readouterr())

    return program


def test_documents_are_the_text_of_windows(row, run, tmp_path):
    code, said = run("--window", "7")
    assert code == 0, said
    lines = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.split() for line in lines] == [
        [WORDS[index].strip() for index in row[start : start + 7]] for start in (0, 7, 14)
    ]
    assert not list(tmp_path.glob(".*partial"))


def test_what_is_impossible_is_refused_and_nothing_is_lost(row, run, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    code, said = run()
    assert code == 2 and "`OUTPUT` must not exist yet" in said
    code, said = run("--force")
    assert code == 2 and "`OUTPUT` can be replaced only if this program wrote it" in said
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    (tmp_path / "out.jsonl").unlink()
    assert run("--window", "5")[0] == 0
    before = (tmp_path / "out.jsonl").read_text()
    for arguments, named, message in (
        (("--window", "0"), {}, "`--window` must be at least 1, got 0"),
        (("--window", "24", "--force"), {}, "`TOKENS` must be at least one window of 24, got 23"),
        (("--force",), {"tokens": "none.bin"}, "`TOKENS` must be a file of token ids"),
        (("--force",), {"tokenizer": "none"}, "`TOKENIZER` must be the folder"),
    ):
        code, said = run(*arguments, **named)
        assert code == 2 and message in said, said
    np.array([1, 2, len(WORDS)] * 9, dtype="<u2").tofile(tmp_path / "row.bin")
    code, said = run("--window", "7", "--force")
    assert code == 2 and "`TOKENIZER` must have made the ids, got 31 tokens and the id 31" in said
    assert (tmp_path / "out.jsonl").read_text() == before
    row.astype("<u2").tofile(tmp_path / "row.bin")
    assert run("--window", "7", "--force")[0] == 0
    assert (tmp_path / "out.jsonl").read_text() != before
