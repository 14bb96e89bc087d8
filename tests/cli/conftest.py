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
