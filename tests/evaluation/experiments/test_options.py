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
    ("sharding_plan", "--gpus 12", "`--gpus` must be positive, in whole machines of 8, got 12"),
    ("sharding_plan", "--node 0", "`--node` must be at least 1, got 0"),
    ("compare", "FOLDER FOLDER", "`TRAIN` must be a file of at least"),
    ("compare", "TOKENS TOKENS --figure TOKENS", "`--figure` must not replace what is read"),
    ("compare", "TOKENS TOKENS --summary FOLDER/tokens.bin", "`--summary` must not replace what is read"),
    ("compare", "TOKENS TOKENS --figure FOLDER/theirs.png", "`--figure` can be replaced only if this program wrote"),
    ("compare", "TOKENS TOKENS --figure FOLDER/link.png", "`--figure` can be replaced only if this program wrote"),
    ("compare", "TOKENS TOKENS --figure FOLDER/loop.png", "`--figure` must be a path that can be followed"),
    ("compare", "TOKENS TOKENS --figure FOLDER/a.xyz", "`--figure` must end in one of .png, .svg, .pdf"),
    ("compare", "TOKENS TOKENS --figure /proc/a.png", "`--figure` must be a place that can be written to"),
    ("compare", "TOKENS TOKENS --summary /proc/a.json", "`--summary` must be a place that can be written to"),
    ("compare", "TOKENS TOKENS --only []", "`--only` must name some of"),
    ("compare", "TOKENS TOKENS --seeds 0", "`--seeds` must be at least 1"),
    *((f"symmetry.{name}", words, said)
      for name in ("words", "scan", "modular", "found", "chorales") for words, said in (
          ("--picture FOLDER/out", "`--picture` and `--output` are both written and must not lie in each other"),
          ("--picture FOLDER/theirs.png", "`--picture` can be replaced only if this program wrote it"),
          ("--picture FOLDER/loop.png", "`--picture` must be a path that can be followed"),
          ("--picture FOLDER/a.xyz", "`--picture` must end in one of .png, .svg, .pdf"),
          ("--picture /proc/a.png", "`--picture` must be a place that can be written to"))),
    ("symmetry.words", "--groups []", "`--groups` must name some of"),
    ("symmetry.found", "--groups []", "`--groups` must name some of"),
    ("symmetry.scan", "--splits []", "`--splits` must name some of"),
    *(("symmetry.scan", f"--splits length --longest {longest}", "`--longest` must leave commands to train on, to keep")
      for longest in (4, 22)),
    ("symmetry.modular", "--tasks []", "`--tasks` must name some of"),
    ("symmetry.modular", "--shares []", "`--shares` must have one to sweep the rates with, got none"),
    *(("symmetry.modular", f"--prime {value}", "`--prime` must be a prime number from 5 to 127")
      for value in (10**9 + 7, 131, 9, 3)),
    ("four_bits", "TOKENS FOLDER --output /proc/a.json", "`--output` must be a place that can be written to"),
    ("step_time", "--only [] ", "`--only` must name some of"),
]  # fmt: skip


@pytest.mark.parametrize("name,words,said", BAD, ids=[f"{name} {words}" for name, words, _ in BAD])
@pytest.mark.by_default(28)
def test_options_that_cannot_be_are_refused_as_they_were_typed(name, words, said, tmp_path, capsys, monkeypatch):
    program = importlib.import_module(f"evaluation.experiments.{name}")
    for begun in {"run_one", "measure", "corpus"} & set(vars(program)):
        monkeypatch.setattr(program, begun, lambda *_: pytest.fail("it begins"))
    (tmp_path / "tokens.bin").write_bytes(bytes(2 * 5000))
    (tmp_path / "theirs.png").write_text("years of work")
    (tmp_path / "link.png").symlink_to("theirs.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    before = {path.name for path in tmp_path.iterdir()}
    given = words.replace("TOKENS", str(tmp_path / "tokens.bin")).replace("FOLDER", str(tmp_path)).split()
    assert program.main(given if "--output" in given else [*given, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "theirs.png").read_text() == "years of work"


@pytest.mark.parametrize("name", ["group_words", "symmetry.words", "symmetry.found"])
def test_words_for_which_there_is_no_memory_are_refused(name, tmp_path, capsys):
    program, output = importlib.import_module(f"evaluation.experiments.{name}"), tmp_path / "out"
    small = [
        "--groups",
        "S3",
        "--only",
        "RiGPT",
        "--hidden-size",
        "8",
        "--layers",
        "1",
        "--heads",
        "1",
        "--seeds",
        "1",
    ]
    assert program.main([*small, "--steps", str(10**9), "--output", str(output)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "`--steps`, `--batch` and `--length` must ask for at most 67,108,864 elements" in line and not output.exists()
    )


def test_a_barrier_that_is_none_is_said_in_words(capsys):
    """Beside one of which a part is left."""
    merged = {
        method: dict.fromkeys((merging.UNALIGNED, merging.PERMUTED, merging.ALIGNED, merging.LEARNED), 2.0)
        for method in merging.METHODS
    }
    for before, words in ((0.0, ["no barrier"]), (0.5, ["50%", "25%"])):
        path = LossPath([0.0, 0.5, 1.0], *([2.0, 2.0 + before / part, 2.0] for part in (1, 2, 4)))
        pair = merging.Pair((0, 1), (2.0, 2.0), 1.0, path, merged)
        assert math.isnan(pair.kept) == (before == 0)
        Console(width=200).print(merging.as_table([pair], merging.summarise([pair]), 600))
        out = capsys.readouterr().out
        assert all(word in out for word in (*words, "after 600 steps")) and "nan" not in out
