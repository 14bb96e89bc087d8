"""`--json -`: standard output is one document, whatever else a verb has to say."""

import inspect
import json
from pathlib import Path

import pytest

from rigpt_hf.cli import VERBS
from rigpt_hf.cli.common import as_json
from tests.cli.conftest import in_one_line


CASES = {
    "verify": ("rigpt", "rigpt-untied", "--random-tokens"),
    "families": (),
    "info": ("rigpt",),
    "charges": ("rigpt", "--measure", "--time", 0.02),
    "fingerprint": ("rigpt", "gpt2"),
    "identify": ("rigpt", "--against", "known"),
    "diff": ("rigpt", "gpt2"),
}
# Codes say what was found, as ever.
DIFFERENT = {"verify", "diff"}


def test_every_verb_that_has_it_is_here():
    """But for the one that writes a line for each text."""
    having = {verb.__name__ for verb in VERBS if {"json", "json_file"} & {*inspect.signature(verb).parameters}}
    assert having == {*CASES, "generate"}


@pytest.mark.parametrize("verb", CASES)
def test_standard_output_is_one_document(verb, rigpt, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rigpt", "rigpt-untied", "gpt2"):
        Path(name).symlink_to(folders / name)
    if verb == "identify":
        assert rigpt("fingerprint", "rigpt", "--output", "known/it")[0] == 0
    before = sorted(Path().iterdir())
    code, out, err = rigpt(verb, *CASES[verb], "--json", "-")
    assert code == (verb in DIFFERENT), err
    assert isinstance(json.loads(out), dict) and "Next" not in err and sorted(Path().iterdir()) == before
    assert rigpt(verb, *CASES[verb], "--json", "-", "--quiet") == (code, out, "")
    # The same as in a file, beside which tables are shown.
    _, shown, _ = rigpt(verb, *CASES[verb], "--json", "file.json")
    assert Path("file.json").read_text() == out == as_json(json.loads(out)) and "Next: " in shown


def test_a_refusal_leaves_standard_output_empty(rigpt, tmp_path):
    code, out, err = rigpt("info", tmp_path / "gone", "--json", "-")
    assert (code, out) == (2, "") and "must be the folder" in err


def test_what_is_printed_by_others_goes_to_standard_error(rigpt, folders, monkeypatch):
    from rigpt_hf.checkpoints import opened

    monkeypatch.setattr(opened, "open_model", lambda *_, **__: print("a library") or 1 / 0)
    code, out, err = rigpt("info", folders / "gpt2", "--json", "-")
    assert (code, out) == (2, "") and err.startswith("a library\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("info sm --json", "`--json` must have a value behind it, got none. See rigpt info --help"),
        ("rotate sm out --frames", "`--frames` must have a value behind it, got none. See rigpt rotate --help"),
        ("finetune sm --seed", "`--seed` must have a value behind it, got none. See rigpt finetune --help"),
        ("rotate sm out --inverse=3", "Option '--inverse' does not take a value. See rigpt rotate --help"),
    ],
)
def test_an_option_without_its_value_is_a_fault_of_its_verb(words, said, rigpt):
    assert in_one_line(rigpt(*words.split())).strip() == f"rigpt: {said}"


def test_the_help_says_so(done):
    assert "a file, or - for standard output" in " ".join(done("diff", "--help").split())
