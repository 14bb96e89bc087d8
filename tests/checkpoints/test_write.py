"""Folders that are written: complete or absent, in shards, cast once, with all that a user needs."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rigpt_hf.checkpoints import folder as folder_module
from rigpt_hf.checkpoints import write as write_module
from rigpt_hf.checkpoints.folder import new_file
from rigpt_hf.checkpoints.workers import together
from rigpt_hf.checkpoints.write import Entry, parse_size, split_into_shards

from .folders import VERBS, contents, save_tokenizer, stored


over_verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())


@over_verbs
def test_the_folder_holds_all_that_a_user_needs(verb, tmp_path):
    source, output = tmp_path / "source", tmp_path / "out"
    model = verb.model(torch.float32)
    model.save_pretrained(source)
    GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=[2, 5]).save_pretrained(source)
    save_tokenizer(source)
    (source / "notes.txt").write_text("private")
    verb.run(source, output)
    assert {"config.json", "model.safetensors", "certificate.json", "modeling_rigpt.py"} <= contents(output)
    assert "notes.txt" not in contents(output) and contents(tmp_path) == {"source", "out"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir() if path.is_file()}
    assert len(modes) == 1, "weights are as readable as what lies beside them"
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["RiGPTForCausalLM"] and config["dtype"] == "float32"
    # The code that a process without the package loads it from is that of `save_pretrained`.
    verb.result(model).save_pretrained(tmp_path / "saved")
    assert config["auto_map"] == json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    code = [{path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in (output, tmp_path / "saved")]
    assert code[0] == code[1] and len(code[0]) > 3
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.vocab_size == model.config.vocab_size
    assert loaded.generation_config.temperature == 0.6 and loaded.generation_config.eos_token_id == [2, 5]
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    assert first("c a b")["input_ids"] == second("c a b")["input_ids"] == [2, 0, 1]
    assert second.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<user>a"


@over_verbs
def test_products_beyond_the_dtype_are_refused(verb, tmp_path):
    """In the words of the source: the folder in which they would be is gone."""
    model = verb.model(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`source` must .*got .*source.*") as error:
        verb.run(tmp_path / "source", tmp_path / "out")
    assert "partial" not in str(error.value) and "range" in str(error.value)
    assert contents(tmp_path) == {"source"}


@over_verbs
def test_shards_in_and_out(verb, tmp_path):
    model = verb.model(torch.float64)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    verb.run(tmp_path / "source", tmp_path / "out", max_shard_size="30KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    tensors, expected = stored(tmp_path / "out"), verb.result(model).state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert set(tensors) == set(index["weight_map"]) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            assert torch.equal(handle.get_tensor(name), expected[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize(
    "verb, kept, asked",
    [
        ("convert", "float32", "bfloat16"),
        ("transform", "bfloat16", "float64"),
        ("transform", "bfloat16", None),
        pytest.param("transform", "float32", "bfloat16", marks=pytest.mark.full),
        pytest.param("convert", "bfloat16", "float64", marks=pytest.mark.full),
        pytest.param("convert", "bfloat16", None, marks=pytest.mark.full),
    ],
)
def test_weights_are_cast_once(verb, kept, asked, tmp_path):
    verb = VERBS[verb]
    model = verb.model(getattr(torch, kept))
    model.save_pretrained(tmp_path / "source")
    certificate = verb.run(tmp_path / "source", tmp_path / "out", dtype=asked and getattr(torch, asked))
    assert certificate.dtype == (asked or kept)
    # A cast to fewer digits is part of what is certified.
    assert certificate.source_dtype == ("float64" if asked == "float64" else kept)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == (asked or kept)
    result, expected = getattr(torch, asked or kept), verb.result(model.to(torch.float64)).state_dict()
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name].to(result)), name


class TestNothingIsLeftBehind:
    def test_by_an_interruption(self, tmp_path, monkeypatch):
        VERBS["transform"].model(torch.float32).save_pretrained(tmp_path / "source")

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        steps = dict.fromkeys(("write_shards", "save_config", "save_tokenizer", "compare"), write_module)
        for step, module in (steps | {"publish": folder_module}).items():
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(module, step, interrupt)
                VERBS["transform"].run(tmp_path / "source", tmp_path / "out")
            assert contents(tmp_path) == {"source"}, step

    def test_and_an_earlier_model_survives(self, tmp_path, monkeypatch):
        verb, source, output = VERBS["convert"], tmp_path / "source", tmp_path / "out"
        verb.model(torch.float32).save_pretrained(source)
        verb.run(source, output)
        before = (output / "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match="`output_dir` must be empty or absent.*`force=True`"):
            verb.run(source, output)
        with monkeypatch.context() as patch:
            patch.setattr(write_module, "write_shards", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                verb.run(source, output, force=True)
        assert (output / "model.safetensors").read_bytes() == before
        verb.run(source, output, force=True, dtype=torch.float64)
        assert (output / "model.safetensors").read_bytes() != before
        (output / "notes.txt").touch()
        with pytest.raises(ValueError, match="`output_dir` can be replaced only if all in it.*with notes.txt. Move"):
            verb.run(source, output, force=True)
        assert contents(tmp_path) == {"source", "out"} and "notes.txt" in contents(output)

    def test_of_a_file_that_is_not_whole(self, tmp_path):
        with new_file(tmp_path / "file") as place:
            place.write_text("first")
        with pytest.raises(ZeroDivisionError), new_file(tmp_path / "file") as place:
            place.write_text("second")
            1 / 0  # noqa: B018
        assert (tmp_path / "file").read_text() == "first" and contents(tmp_path) == {"file"}


class TestOutputs:
    def test_folders_that_are_no_models_are_never_replaced(self, tmp_path):
        verb, source, home = VERBS["convert"], tmp_path / "source", tmp_path / "home"
        verb.model(torch.float32).save_pretrained(source)
        home.mkdir()
        (home / "thesis.tex").touch()
        for output, force, message in (
            (home, True, "can be replaced only if all in it was written by this program.*thesis.tex"),
            (source, True, "must not hold the source"),
            (tmp_path, True, "must not hold the source"),
            (home / "thesis.tex", False, "must be a folder, got the file"),
            (home / "thesis.tex" / "below", False, "`output_dir` must be a folder, or a new name in one, got"),
        ):
            with pytest.raises(ValueError, match=message):
                verb.run(source, output, force=force)
        assert contents(home) == {"thesis.tex"} and contents(tmp_path) == {"source", "home"}

    def test_sizes(self):
        assert [parse_size(size) for size in ("500MB", "1.5 GB", 7)] == [5 * 10**8, 15 * 10**8, 7]
        for size in ("big", "5", "0GB", 0):
            with pytest.raises(ValueError, match="`max_shard_size` must be"):
                parse_size(size)

    def test_no_process_is_left_without_a_shard(self):
        entries = [Entry(str(index), (10,), lambda dtype: torch.empty(0)) for index in range(12)]
        assert list(split_into_shards(entries, torch.float32, None)) == ["model.safetensors"]
        for count in (2, 3, 5):
            shards = split_into_shards(entries, torch.float32, None, count)
            assert len(shards) >= count and [entry for group in shards.values() for entry in group] == entries
        assert [len(group) for group in split_into_shards(entries, torch.float32, 200).values()] == [5, 5, 2]


def test_one_process_that_fails_takes_the_others_with_it():
    class Other:
        index, count = 0, 2

        def __init__(self, message):
            self.message = message

        def gather(self, value):
            return [value, self.message]

    assert together(Other(None), lambda: os.getpid()) == os.getpid()
    with pytest.raises(RuntimeError, match="Process 1 failed and took the others with it. ValueError: full"):
        together(Other("ValueError: full"), lambda: None)
    with pytest.raises(ZeroDivisionError):
        together(Other(None), lambda: 1 / 0)
