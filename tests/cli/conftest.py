"""Runs the command line in the process of the tests."""

import io
import sys

import pytest

from rigpt_hf import cli


@pytest.fixture
def rigpt(monkeypatch, capsys):
    """Runs the command in this process; gives its exit code, standard output and standard error."""

    def run(*arguments, columns=200):
        monkeypatch.setattr(sys, "argv", ["rigpt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def done(rigpt):
    """The same of a command that must succeed; gives its standard output."""

    def run(*arguments, **options) -> str:
        code, out, err = rigpt(*arguments, **options)
        assert code == 0, err
        return out

    return run


def in_one_line(result) -> str:
    """The one line on standard error in which bad input ends."""
    code, _, err = result
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A RiGPT, the same in shards, and a stock model, each with a tokenizer; and a text."""
    import torch

    from tests.checkpoints.folders import save_tokenizer
    from tests.conversion.sources import stock_model
    from tests.models import tiny_model

    place = tmp_path_factory.mktemp("folders")
    tiny_model().save_pretrained(place / "rigpt")
    tiny_model().save_pretrained(place / "shards", max_shard_size=20_000)
    tiny_model(tie_word_embeddings=False).save_pretrained(place / "rigpt-untied")
    stock_model("gpt2", torch.float32).save_pretrained(place / "gpt2")
    for folder in list(place.iterdir()):
        save_tokenizer(folder)
    (place / "text.txt").write_text("\n\n".join("a b c a a b c" + n * " a" for n in range(200)))
    return place


@pytest.fixture
def answer(rigpt, monkeypatch, capsys, tmp_path):
    """Runs a verb or program on folders below `tmp_path`, with `yes` on standard input."""

    def run(program, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        if program == "rigpt":
            return rigpt(*arguments)
        code = main_of(program)([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def main_of(program: str):
    from rigpt_hf.training import finetune, pretrain
    from training import convert

    return {"convert.py": convert.main, "pretrain": pretrain.main, "finetune": finetune.main}[program]
