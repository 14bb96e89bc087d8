"""What is said at the terminal: texts of others are seen as they are, and an output that fails costs nothing."""

import io
import logging
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from rigpt_hf.command_line import execute, make_app
from rigpt_hf.terminal import Console, Output, safe_output, say, visible
from rigpt_hf.text.markup import literal
from tests.processes import ROOT, run


FOREIGN = "a\x1b[2J\x07\x9b1m\u202eb\rc"
SEEN = r"a\x1b[2J\x07\x9b1m\u202eb\rc"


def test_texts_of_others_cannot_steer_a_terminal():
    """In lines, tables and markup; styles of our own stay."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=100)
    console.print(FOREIGN, markup=False, highlight=False)
    table = Table("name")
    table.add_row(FOREIGN)
    console.print(table)
    console.print("[bold]ours[/bold]", soft_wrap=True)
    written = file.getvalue()
    assert "\x1b[1mours\x1b[0m" in written, "without styles there would be nothing to tell apart"
    for unwanted in ("\x1b[2J", "\x07", "\x9b", "\u202e", "\r"):
        assert unwanted not in written
    assert written.count(r"a\x1b[2J") == 2
    assert visible(FOREIGN + "\n\t") == SEEN + r"\n\t" and visible("Δ ü 日本") == "Δ ü 日本"
    assert literal("a\tb\nc\x1b") == "a b c"


def test_errors_warnings_and_plain_lines_are_visible(capsys):
    app = make_app()

    @app.command()
    def main(fails: bool = False):
        logging.getLogger("x").error("a folder %s of\nothers", FOREIGN)
        say(f"a line {FOREIGN}\nand one")
        if fails:
            raise ValueError(f"no {FOREIGN}\nyes")

    handler = logging.StreamHandler(errors := io.StringIO())
    logging.getLogger("x").addHandler(handler)
    try:
        assert execute(app, "x.py", ["--fails"]) == 2 and execute(app, "x.py", []) == 0
    finally:
        logging.getLogger("x").removeHandler(handler)
    printed = capsys.readouterr()
    assert printed.out == f"a line {SEEN}\nand one\n" * 2
    assert printed.err == "x.py: no " + SEEN.replace(r"\r", " ") + " yes\n"
    assert errors.getvalue() == f"a folder {SEEN} of\nothers\n" * 2


class Closed(io.StringIO):
    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_an_output_that_fails_is_said_last_and_stops_nothing(monkeypatch, capsys):
    done = []
    app = make_app()

    @app.command()
    def main():
        say("a")
        done.append(1)

    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", Full())
        assert execute(app, "x.py", []) == 2
    assert done == [1]
    said = "x.py: standard output must take what is said, got No space left on device. All else is done and whole.\n"
    assert capsys.readouterr().err == said
    assert execute(app, "x.py", []) == 0 and capsys.readouterr() == ("a\n", "")
    with monkeypatch.context() as patched:  # whoever reads it, such as `head`, has seen enough
        patched.setattr("sys.stdout", Closed())
        assert execute(app, "x.py", []) == 0
    assert done == [1] * 3 and capsys.readouterr().err == ""
    with pytest.raises(KeyError), safe_output():  # other failures stay what they are
        raise KeyError
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Output(narrow).write("Δü")
    narrow.flush()
    assert narrow.buffer.getvalue() == rb"\u0394" + b"\xfc"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_verbs_on_a_full_device_and_in_a_narrow_encoding(folders, tmp_path):
    """The output is whole, in both, and standard error has one line or none."""
    for full, code, lines in ((True, 2, 1), (False, 0, 0)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = shlex.join(["rotate", str(folders / "rigpt"), str(tmp_path / "out")])
        change = (
            "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)" if full else "sys.stdout.reconfigure(encoding='latin-1')"
        )
        command = f"import os, shlex, sys; {change}; sys.argv = ['rigpt', *shlex.split({words!r})]\n"
        done = run("-c", f"{command}from rigpt_hf.cli import main\nmain()", cwd=tmp_path)
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("Transforming")]
        assert done.returncode == code and len(said) == lines, done.stderr
        assert (tmp_path / "out/certificate.json").is_file() and (r"\u0394" in done.stdout) == (not full)


@pytest.mark.parametrize(
    "name,value",
    {
        "WORLD_SIZE": "x",
        "RANK": "",
        "LOCAL_RANK": "1.5",
        "MASTER_PORT": "9" * 30,
        "ACCELERATE_MIXED_PRECISION": "a",
    }.items(),
)
def test_an_environment_of_no_launcher_is_named(name, value, capsys, monkeypatch):
    app, done = make_app(), []
    app.command()(lambda: done.append(1))
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("rigpt_hf.command_line.PATIENCE", 0)
    assert execute(app, "x.py", []) == 2 and not done
    error = capsys.readouterr().err
    assert f"x.py: `{name}` in the environment must be " in error and f"got {value[:80]!r}" in error
    monkeypatch.setenv(name, "bf16" if "PRECISION" in name else "1")
    assert execute(app, "x.py", []) == 0 and done == [1]


def test_a_name_in_a_file_of_weights_cannot_steer_a_terminal(folders, tmp_path, capfd):
    from rigpt_hf.cli import app

    broken = shutil.copytree(folders / "rigpt", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors") | {"x\x1b[2J\ny": torch.zeros(1)}
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert execute(app, "rigpt", ["rotate", str(broken), str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert "\x1b[2J" not in error and r"x\x1b[2J" in error and error.count("\n") == 1


def test_where_errors_cannot_be_written_the_code_still_says_so(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rigpt_hf.cli", "info", str(tmp_path / "nothing")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 2 and not done.stdout


def test_quiet_says_nothing_and_does_the_same(rigpt, folders, tmp_path):
    assert "Written" in rigpt("rotate", folders / "gpt2", tmp_path / "said")[1]
    assert rigpt("rotate", folders / "gpt2", tmp_path / "quiet", "--quiet") == (0, "", "")
    said, quiet = (load_file(tmp_path / name / "model.safetensors") for name in ("said", "quiet"))
    assert said.keys() == quiet.keys() and all(torch.equal(said[name], quiet[name]) for name in said)
    # Differences are told by the code, faults in one line, and a text is what its verb is for.
    assert rigpt("verify", folders / "rigpt", folders / "rigpt-untied", "--quiet") == (1, "", "")
    assert "must be the folder" in rigpt("verify", folders / "rigpt", "gone", "--quiet")[2]
    assert rigpt("generate", folders / "rigpt", "a b", "--max-new-tokens", 2, "--quiet")[1].strip()
    assert "Written" in rigpt("rotate", folders / "gpt2", tmp_path / "later")[1]
