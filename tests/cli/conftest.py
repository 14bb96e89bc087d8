"""Runs the command line in the process of the tests."""

import sys

import pytest

from rigpt_hf import cli


@pytest.fixture
def rigpt(monkeypatch, capsys):
    """Runs the command in this process; gives its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rigpt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
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

    def run(*arguments) -> str:
        code, out, err = rigpt(*arguments)
        assert code == 0, err
        return out

    return run


def in_one_line(result) -> str:
    """The one line on standard error in which bad input ends."""
    code, _, err = result
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err
