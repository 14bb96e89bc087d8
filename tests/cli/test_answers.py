"""Input that would keep a person waiting, or be answered in the words of a library or in thousands of characters."""

import os
import signal

import pytest

from tests.cli.conftest import in_one_line
from tests.cli.folders import copied, edit
from tests.cli.test_damage import UPSTREAM


@pytest.fixture(autouse=True)
def patience():
    """A test that waits for a pipe fails."""

    def end(*_):
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "arguments",
    [
        ("card", "MODEL", "--metadata", "PIPE"),
        ("card", "MODEL", "--results", "PIPE"),
        ("demo", "--output", "OUT", "--config", "PIPE"),
        ("demo", "--output", "OUT", "--text", "PIPE"),
        ("evaluate", "MODEL", "--output", "OUT", "--suite", "PIPE"),
        ("verify", "MODEL", "MODEL", "--text", "PIPE"),
        ("publish", "MODEL", "me/x", "--dry-run", "--card", "PIPE"),
        ("rotate", "MODEL", "OUT", "--transformation", "PIPE"),
    ],
    ids=lambda value: f"{value[0]} {value[-2]}",
)
def test_a_pipe_is_no_file(arguments, rigpt, folders, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    places = {"MODEL": folders / "rigpt", "PIPE": tmp_path / "pipe", "OUT": tmp_path / "out"}
    line = in_one_line(rigpt(*(places.get(argument, argument) for argument in arguments)))
    assert str(tmp_path / "pipe") in line and f"`{arguments[-2]}`" in line.replace("`config`", "`--config`"), line
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "merge.json", "vocab.txt", "certificate.json"])
def test_a_pipe_in_the_folder_of_a_model(name, rigpt, folders, tmp_path):
    model, out = copied(folders / "rigpt", tmp_path / "model"), tmp_path / "out"
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for call in (("card", model, "--force"), ("rotate", model, out), ("merge", folders / "rigpt", model, out)):
        line = in_one_line(rigpt(*call))
        assert f"must have files, got '{model / name}', which is a pipe or a device. Put a file there" in line, line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--megabytes", "nan"), "`--megabytes` must be positive and finite, got nan."),
        (("demo", "--megabytes", "inf"), "`--megabytes` must be positive and finite, got inf."),
        (("demo", "--config", "long.yaml"), "a number or a date in it is impossible or too long"),
        (("evaluate", "MODEL", "--suite", "long.yaml"), "a number or a date in it is impossible or too long"),
        (("evaluate", "MODEL", "--suite", "date.yaml"), "a number or a date in it is impossible or too long"),
        (("card", "MODEL", "--metadata", "nothing"), "got 'nothing': No such file or directory"),
        (("card", "MODEL", "--metadata", "date.yaml"), "a number or a date in it is impossible or too long"),
        (("card", "RUN"), "that cannot be read: a value in it is absent, impossible or of another kind"),
        (("rotate", "DIGITS", "out"), "a number in it has too many digits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_words_are_our_own(arguments, words, rigpt, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.yaml").write_text(f"tasks: [{{metric: perplexity, documents: {'9' * 5000}}}]")
    (tmp_path / "date.yaml").write_text("tasks: 2026-13-45")
    places = {"MODEL": folders / "rigpt"}
    for name, file, content in (("RUN", "run.json", "[]"), ("DIGITS", "config.json", f'{{"a": {"1" * 5000}}}')):
        places[name] = copied(folders / "rigpt", tmp_path / name)
        (places[name] / file).write_text(content)
    line = in_one_line(rigpt(*(places.get(argument, argument) for argument in arguments)))
    assert words in line and not any(word in line for word in (*UPSTREAM, "limit (4300", "cannot convert")), line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--steps", "x" * 4000),
        ("--megabytes", "x " * 2000),
        ("x" * 4000,),
        ("--points", "x" * 4000),
        (f"--{'x' * 4000}",),
    ],
    ids=lambda value: value[0][:12],
)
def test_what_was_typed_is_repeated_in_short(arguments, rigpt):
    line = in_one_line(rigpt("demo", *arguments))
    assert len(line) < 400 and (f"'{arguments[0]}'" in line or "xxx" in line)


def test_a_refused_conversion_gives_its_reason_alone(rigpt, folders, tmp_path, caplog):
    """And one that is done says what a person must know of it."""
    stock, out, back = copied(folders / "gpt2", tmp_path / "stock"), tmp_path / "out", tmp_path / "back"
    edit(stock, "config.json", resid_pdrop=0.1, embd_pdrop=0.1)
    assert "`--max-shard-size`" in in_one_line(rigpt("convert", stock, out, "--max-shard-size", "big"))
    assert not caplog.records
    assert rigpt("convert", stock, out)[0] == 0
    assert "dropout of single coordinates of the stream" in caplog.records.pop().message and not caplog.records
    (out / "tokenizer.model").symlink_to(tmp_path / "elsewhere")
    assert "link out of the folder" in in_one_line(rigpt("export", out, back)) and not caplog.records
    (out / "tokenizer.model").unlink()
    assert rigpt("export", out, back)[0] == 0
    assert "which is all the stock model has" in caplog.records.pop().message and not caplog.records
