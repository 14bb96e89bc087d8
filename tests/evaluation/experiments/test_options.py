"""Options of experiments that no run can have are refused first, as they were typed; and no number is shown as nan."""

import importlib
import math

import pytest
from rich.console import Console

from evaluation.experiments import merging
from rigpt_hf.symmetry import LossPath


BAD = [
    *(("merging", f"--megabytes {value}", "`--megabytes` must be positive") for value in ("nan", "inf", "0", "-1")),
    *(("merging", f"--learning-rate {value}", "`--learning-rate` must be positive") for value in ("nan", "inf", "-1")),
    *(("merging", f"--weight-decay {value}", "`--weight-decay` must be at least 0") for value in ("nan", "inf", "-1")),
    *(("merging", f"--vocabulary {value}", "`--vocabulary` must be more than") for value in ("9" * 9, "256", "-1")),
    *((name, f"--{option} {value}", f"`--{option}` must be at least 1")
      for name in ("merging", "group_words") for option in ("layers", "heads", "hidden-size") for value in (-1, 0)),
    *((name, "--hidden-size 7 --heads 3", "`--hidden-size` must be a multiple of `--heads`, got 7 and 3")
      for name in ("merging", "group_words")),
    ("merging", "--activation bogus", "--activation"),
    ("optimizer_cost", "--tokens 0", "`--tokens` must be at least 1, got 0"),
    ("optimizer_cost", "--sequence 0", "`--sequence` must be at least 2, got 0"),
    ("optimizer_cost", "--rows 0", "`--rows` must be at least 1, got 0"),
    ("optimizer_cost", "--turns 0", "`--turns` must be at least 1, got 0"),
    ("optimizer_cost", "--device bogus", "--device"),
    ("compare", "FOLDER FOLDER", "`TRAIN` must be a file of at least"),
]  # fmt: skip


@pytest.mark.parametrize("name,words,said", BAD, ids=[f"{name} {words}" for name, words, _ in BAD])
def test_options_that_cannot_be_are_refused_as_they_were_typed(name, words, said, tmp_path, capsys, monkeypatch):
    program = importlib.import_module(f"evaluation.experiments.{name}")
    monkeypatch.setattr(program, "run", lambda *_: pytest.fail("it begins"))
    output = tmp_path / "out"
    given = words.replace("FOLDER", str(tmp_path)).split()
    assert program.main([*given, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not output.exists()


def test_a_barrier_that_is_none_is_said_in_words(capsys):
    """Beside one of which a part is left."""
    merged = {
        method: dict.fromkeys((merging.UNALIGNED, merging.PERMUTED, merging.ALIGNED), 2.0)
        for method in merging.METHODS
    }
    for before, words in ((0.0, "no barrier"), (0.5, "50%")):
        path = LossPath([0.0, 0.5, 1.0], [2.0, 2.0 + before, 2.0], [2.0, 2.0 + before / 2, 2.0])
        pair = merging.Pair((0, 1), (2.0, 2.0), 1.0, path, merged)
        assert math.isnan(pair.kept) == (before == 0)
        Console(width=200).print(merging.as_table([pair], merging.summarise([pair])))
        out = capsys.readouterr().out
        assert words in out and "nan" not in out
