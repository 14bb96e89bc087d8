"""Paths that lead nowhere are refused by what a person typed, before anything is read."""

import os

import pytest

from tests.cli.conftest import in_one_line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert LOOP out", "`SOURCE` must be a path that can be followed, got 'loop': its links lead in a circle"),
        ("convert none LOOP", "`OUTPUT` must be a path that can be followed, got 'loop'"),
        ("convert none LONG", f"`OUTPUT` must be a path that can be followed, got '{'x' * 80}': File name too long"),
        ("lab lie-groups --output LONG", "`--output` must be a path that can be followed, got 'x"),
        ("evaluate none --include-path LONG", "`--include-path` must be a path that can be followed, got 'x"),
        ("diff none none --json LOOP", "`--json` must be a path that can be followed"),
        ("merge none BYTES out", "`SOURCES` must be text in UTF-8, got '\\udcff'"),
        ("convert none out --revision BYTES", "`--revision` must be text in UTF-8"),
        ("evaluate none --output FILE/x", "`--output` must be a name in a folder, got "),
        ("convert none FILE/x", "`OUTPUT` must be a name in a folder, got "),
        ("verify none none --seed -1", "`--seed` must be from 0 to 4294967295, got -1. Take another."),
        ("rotate none out --seed 9999999999", "`--seed` must be from 0 to 4294967295, got 9999999999."),
    ],
)
def test_a_path_that_leads_nowhere(rigpt, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    (tmp_path / "thesis.tex").write_text("years of work")
    words = {"LOOP": "loop", "LONG": "x" * 300, "BYTES": os.fsdecode(b"\xff")}
    assert message in in_one_line(
        rigpt(*(words.get(it, it) for it in arguments.replace("FILE", "thesis.tex").split()))
    )
    assert sorted(os.listdir()) == ["loop", "thesis.tex"]
