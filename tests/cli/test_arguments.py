"""Options that take one of a list: the lists, and the checks that need neither torch nor transformers."""

import json

import pytest
import torch

from rigpt_hf.cli import arguments
from rigpt_hf.conversion import dropout, families, frames, gguf_file
from rigpt_hf.frames import table_of
from rigpt_hf.symmetry import merging
from tests.cli.conftest import in_one_line
from tests.models import ALL, tiny_config
from tests.test_imports import HELP, LOADED, fresh


def test_the_lists_are_those_of_the_library():
    assert set(arguments.TARGETS) == set(families.TARGETS) and arguments.METHODS == merging.METHODS
    assert arguments.STOCK_FRAMES == frames.FRAMES and arguments.DROPOUTS == dropout.CHOICES
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in arguments.DTYPES)
    assert set(arguments.DTYPES) - {"float64"} | {*arguments.ROUNDED} == set(gguf_file.GGUF_DTYPES)
    assert arguments.ROUNDED == gguf_file.ROUNDED
    kinds = {kind for options in ALL.values() for kind in table_of(tiny_config(**options)).kinds}
    assert kinds | {"head", "shifts", "all"} == set(arguments.FRAMES)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "export A out --to gtp2",
            "`--to` must be one of auto, gpt2, llama, mistral, qwen2, ministral, minis",
        ),
        ("export A out --to gtp2", "got 'gtp2'. Did you mean 'gpt2'?"),
        ("export A out --frame up", "`--frame` must be one of auto, lexical, stream, got 'up'. Take one of these."),
        (
            "export A out --to gguf --dtype float64",
            "`--dtype` must be one of float32, bfloat16, float16, q8_0, q4_0",
        ),
        ("export A out --to gpt2 --dtype q4_0", "bfloat16, float16, got 'q4_0', which `--to gguf` alone takes."),
        ("export A out --to onnx --dtype q4_0", "bfloat16, float16, got 'q4_0', which `--to gguf` alone takes."),
        (
            "export A out --to onnx --frame stream",
            "`--frame` must be auto for `--to onnx`, which keeps",
        ),
        ("convert A out --dtype float33", "float16, got 'float33'. Did you mean 'float32'?"),
        ("convert A out --dropout half", "`--dropout` must be one of vector, none, refuse, got 'half'."),
        ("convert A out --qk-gain gain", "`--qk-gain` must be one of vector, metric, got 'gain'."),
        ("verify A A --dtype int8", "`--dtype` must be one of float64, float32, bfloat16, float16, got 'int8'."),
        ("evaluate A --dtype int8", "`--dtype` must be one of float64, float32, bfloat16, float16, got 'int8'."),
        ("rotate A out --frames head,streem", "got 'streem'. Did you mean 'stream'?"),
        ("canonicalize A out --dtype int8", "`--dtype` must be one of"),
        ("merge A A out --method cubic", "`--method` must be one of linear, spherical, got 'cubic'."),
        ("merge A A out --weights a,b", "`--weights` must be numbers separated by commas, got 'a,b'. Write them as"),
        ("merge A A out --weights 0.7", "`--weights` must be 2 numbers, one per model, got 1 in '0.7'. Give 2, sep"),
        ("merge A out", "`SOURCES` must be at least two, got 'A' alone: the last name, 'out', is `OUTPUT`. Name"),
        ("charges A --measure --learning-rates fast", "`--learning-rates` must be numbers separated by commas"),
    ],
)
def test_a_value_of_no_list_is_answered_before_models_are_looked_at(command, said, rigpt, tmp_path, monkeypatch):
    """The folder is none that could be loaded."""
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "config.json").write_text(json.dumps({"model_type": "rigpt"}))
    monkeypatch.chdir(tmp_path)
    line = in_one_line(rigpt(*command.split()))
    assert said in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.full), "--frames streem"])
def test_nothing_heavy_is_imported_for_it(options, tmp_path):
    """And without a fault it is, so that the test shows something."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rigpt"}))
    done = fresh(HELP + LOADED[2:], "rotate", tmp_path, tmp_path.parent / "out", *options.split())
    assert done.stdout.strip().endswith("[]") == bool(options), done.stdout + done.stderr
    assert done.stderr.strip().endswith("2")
