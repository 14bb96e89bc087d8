"""The line that says what goes on: on a terminal, for as long as nothing else is there."""

import io
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from rigpt_hf import status as module
from rigpt_hf.command_line import execute, guarded, make_app
from rigpt_hf.status import Status, Watched, doing, status
from rigpt_hf.text.corpus import gather_documentation
from tests.processes import ROOT


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def begin(monkeypatch):
    """Puts standard output and error on one terminal, where the line appears at once; in a test, as captures move."""

    def begin():
        shown = Terminal()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(module, "PAUSE", 0.05)
    monkeypatch.setattr(module, "PERIOD", 0.01)
    return begin


def seen(written: str) -> list[str]:
    """The lines of a terminal on which this was written."""
    lines = [""]
    column = 0
    for character in re.sub(r"\x1b\[[0-9;?]*[Khlm]", "", written):
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def until(condition):
    """Wait for a thread to do something, for some seconds at most."""
    ends = time.monotonic() + 10
    while not condition() and time.monotonic() < ends:
        time.sleep(0.01)
    assert condition()


def test_the_line_comes_in_silence_and_goes_before_words(begin):
    terminal = begin()
    with status():
        until(lambda: seen(terminal.getvalue())[-1].startswith("Working, "))
        with doing("Reading a\x1b[2Jb"):
            until(lambda: seen(terminal.getvalue())[-1].startswith(r"Reading a\x1b[2Jb, "))
        print("a result")
        until(lambda: seen(terminal.getvalue())[-1].startswith("Working, "))
        with doing("x" * 200):  # as much of it as there is room for
            until(lambda: seen(terminal.getvalue())[-1] == "x" * 79)
    assert seen(terminal.getvalue()) == ["a result", ""]
    assert sys.stdout is terminal and sys.stderr is terminal and Status.now is None
    print("after")
    assert seen(terminal.getvalue()) == ["a result", "after", ""]


def test_bars_have_the_line_for_themselves(begin):
    terminal = begin()

    def silence():
        time.sleep(0.2)
        return seen(terminal.getvalue())[-1]

    with status():
        with tqdm(total=3, desc="Bar") as bar:
            bar.update()
            assert "Bar:  33%" in silence(), "the line would be in its place"
            length = len(terminal.getvalue())
            until(lambda: len(terminal.getvalue()) > length)  # shown again, with the time that has gone by
            assert terminal.getvalue().count("Working") == terminal.getvalue()[:length].count("Working")
        until(lambda: seen(terminal.getvalue())[-1].startswith("Working, "))
        with tqdm(total=3, desc="Hidden", leave=False, delay=100) as bar:
            bar.update()
            until(lambda: seen(terminal.getvalue())[-1].startswith("Working, "))
        with tqdm(total=3, desc="Gone", leave=False) as bar:
            assert "Gone:   0%" in silence()
        until(lambda: seen(terminal.getvalue())[-1].startswith("Working, "))
        sys.stdout.write("Continue? ")
        assert silence() == "Continue?"
        print()
        with Progress(console=Console(stderr=True, force_terminal=True, width=80)) as progress:
            progress.add_task("Task", total=2)
            assert silence().startswith("Task")
        until(lambda: seen(terminal.getvalue())[-1].startswith("Working, "))
    assert "Hidden" not in terminal.getvalue()
    lines = seen(terminal.getvalue())
    assert lines[0].startswith("Bar:  33%") and lines[1] == "Continue?" and lines[-1] == ""


def test_moves_of_the_cursor_leave_no_place(begin):
    terminal = begin()
    line = Status(terminal)
    for text, is_free in (("a", False), ("\n", True), ("\x1b[A", False), ("b\r", True), ("\x1b[?25h", True)):
        line.give_way(text)
        assert line.is_free == is_free, text


def test_who_keeps_a_stream_may_go_on_writing(begin):
    terminal = begin()
    with status():
        kept = sys.stderr
    assert isinstance(kept, Watched)
    kept.write("later\n")
    assert seen(terminal.getvalue()) == ["later", ""] and kept.isatty()


@pytest.mark.parametrize("name,value", [("TERM", "dumb"), ("RANK", "1")])
def test_no_line_where_it_could_not_be_erased_or_another_process_has_it(name, value, begin, monkeypatch):
    terminal = begin()
    monkeypatch.setenv(name, value)
    with status(), doing("nothing"):
        time.sleep(0.2)
    assert terminal.getvalue() == ""


def test_verbs_have_the_line_but_for_quiet_and_json(begin):
    terminal = begin()
    app = make_app()

    @app.command()
    @guarded
    def main(json: bool = False):
        until(lambda: json or Status.now is None or "Working" in terminal.getvalue())
        lines.append(Status.now)

    lines = []
    for arguments in ([], ["--quiet"], ["--json"]):
        assert execute(app, "x.py", arguments) == 0
    assert isinstance(lines[0], Status) and lines[1:] == [None, None]


def test_no_line_in_a_file(tmp_path, capsys):
    with status(), doing("nothing"):
        assert Status.now is None
    assert capsys.readouterr() == ("", "")


def test_gathering_has_a_bar_on_a_terminal_unless_somebody_counts(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("This is a paragraph of some words that is long enough.\n")
    monkeypatch.setattr("rigpt_hf.text.corpus.tqdm", lambda files, *given, **more: bars.append(more) or files)
    bars, counted = [], []
    assert len(gather_documentation(1000, roots=[tmp_path])) == 1
    assert len(gather_documentation(1000, tick=counted.append, roots=[tmp_path])) == 1
    assert [bar["disable"] for bar in bars] == [None, True] and counted == [1]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals that a program can have")
def test_a_verb_on_a_terminal_is_never_silent_for_long(folders, tmp_path):
    """From before its libraries are imported; and what it leaves there is what a file would hold."""
    import pty

    command = [sys.executable, "-m", "rigpt_hf.cli", "rotate", str(folders / "gpt2"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment) as process:
        os.close(theirs)
        written = b""
        try:
            while data := os.read(ours, 65536):
                written += data
        except OSError:  # the end, as Linux says it
            pass
    os.close(ours)
    text = written.decode()
    assert process.returncode == 0, text
    assert text.startswith("Working, "), "before anything else is known"
    assert not any("Working" in line for line in seen(text)) and "Written to" in text
