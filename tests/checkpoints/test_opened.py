"""Any checkpoint, opened as a RiGPT: the same as its conversion, each tensor made when it is asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints import dequantized, opened
from rigpt_hf.checkpoints.opened import open_model
from rigpt_hf.checkpoints.weights import StoredWeights
from rigpt_hf.conversion import convert_checkpoint
from rigpt_hf.conversion.gguf import export_gguf
from tests.conversion.families import FAMILIES, converted_family, family_model
from tests.conversion.programs import FILES
from tests.conversion.sources import stock_model
from tests.models import tiny_model, tokens
from tests.tolerances import CONVERSION


# A variant of each kind in which weights are made: folded, centred, of experts, of heads, with a bias of the head.
QUICK = ("llama", "gpt2", "qwen3", "mixtral", "gptj", "olmo2", "bloom", "gemma", "opt-narrow", "cohere-heads")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
@torch.no_grad()
@pytest.mark.by_default(6)
def test_a_folder_of_any_family_is_what_it_converts_into(name, tmp_path):
    source, converted = converted_family(name)
    source.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert (model.stock, model.stored_dtype, model.notes) == (type(source).__name__, torch.float64, ())
    apart = dict.fromkeys(("dtype", "_name_or_path", "architectures"))
    assert model.config.to_dict() | apart == converted.config.to_dict() | apart
    wanted = dict(converted.named_parameters())
    assert list(model.weights.shapes) == list(wanted)
    for key, parameter in wanted.items():
        assert model.weights.shapes[key] == tuple(parameter.shape)
        assert torch.equal(model.weights.read(key), parameter), key
    loaded = model.load()
    assert loaded.dtype is torch.float64 and not loaded.training
    assert difference(loaded(tokens(1, 9)).logits, converted(tokens(1, 9)).logits) <= CONVERSION[torch.float64]


def test_products_of_numbers_of_16_bits_keep_their_digits(tmp_path):
    source = family_model("qwen3-tied", torch.bfloat16)
    source.save_pretrained(tmp_path)
    model, query, table = open_model(tmp_path), "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
    layer = source.model.layers[1]
    exact = layer.self_attn.q_proj.weight.double() * layer.input_layernorm.weight.double()
    made = model.weights.read(query)
    assert made.dtype is model.dtype is torch.float32 and model.stored_dtype is torch.bfloat16
    assert torch.equal(made.double(), exact) and difference(made.to(torch.bfloat16), exact) > 1e-3
    # What nothing is multiplied with is as it was.
    assert model.weights.dtypes[table] is torch.bfloat16
    assert torch.equal(model.weights.read(table), source.model.embed_tokens.weight)
    assert model.load(torch.float64).dtype is torch.float64


def test_what_is_said_to_be_kept_loses_nothing(tmp_path):
    """Of all tensors that claim it, over families in which norms centre, scale or have no gain; others lose digits."""
    kept = {True: 0, False: 0}
    for name in ("gpt2", "granite-tied", "nanochat", "mixtral", "opt-no-gains", "phi-heads"):
        source = stock_model("gpt2", torch.bfloat16) if name == "gpt2" else family_model(name, torch.bfloat16)
        source.save_pretrained(tmp_path / name)
        for entry in open_model(tmp_path / name).weights.entries.values():
            exact = entry.make(torch.float64)
            if entry.kept is not None:
                assert torch.equal(entry.make(entry.kept).double(), exact), entry.name
            elif torch.equal(exact.to(torch.bfloat16).double(), exact) and exact.any():
                continue
            kept[entry.kept is not None] += 1
    assert kept[True] > 20 and kept[False] > 20


def test_a_rigpt_is_as_it_is_stored(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    found = open_model(tmp_path)
    assert found.stock is None and found.dtype is torch.float32 and len(list(tmp_path.glob("*.safetensors"))) > 1
    assert list(found.weights.shapes) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(found.weights.read(name), parameter)
    assert torch.equal(found.load()(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    family_model("qwen2").save_pretrained(tmp_path / "stock")
    tiny_model().save_pretrained(tmp_path / "rigpt")
    read, get = [], StoredWeights._get
    monkeypatch.setattr(StoredWeights, "_get", lambda self, name: read.append(name) or get(self, name))
    for name, key, wanted in (
        ("stock", "model.layers.2.mlp.up_proj.weight", {"mlp.up_proj", "post_attention_layernorm"}),
        ("rigpt", "model.layers.0.self_attn.v_proj.weight", {"self_attn.v_proj"}),
    ):
        found = open_model(tmp_path / name)
        assert read == []
        found.weights.read(key)
        assert {one.split(".", 3)[3].removesuffix(".weight") for one in read} == wanted
        read.clear()


@pytest.mark.parametrize("program", FILES)
@torch.no_grad()
def test_files_of_other_programs_are_opened(program, tmp_path):
    path, right, _ = FILES[program](tmp_path)
    model = open_model(path)
    assert model.stock in ("GPT2LMHeadModel", "LlamaForCausalLM")
    assert (
        difference(model.load(torch.float64)(tokens(2, 20)).logits, right(tokens(2, 20))) <= CONVERSION[torch.float64]
    )
    with pytest.raises(ValueError, match="`revision` belongs to a folder or an id, got 'main' with the file"):
        open_model(path, revision="main")


@torch.no_grad()
def test_a_gguf_file_is_named_itself_or_in_its_folder(tmp_path):
    source = stock_model("llama", torch.float32)
    source.save_pretrained(tmp_path / "stock")
    convert_checkpoint(tmp_path / "stock", tmp_path / "rigpt", progress=False)
    export_gguf(tmp_path / "rigpt", tmp_path / "gguf", dtype="float32", progress=False)
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    for model in (open_model(path), open_model(path.parent, gguf_file=path.name)):
        assert model.stock == "LlamaForCausalLM" and model.notes == (f"{model.name} is GGUF, decoded to float32.",)
        logits = model.load()(tokens(1, 9)).logits
        assert difference(logits, source(tokens(1, 9)).logits) <= CONVERSION[torch.float32]
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ValueError, match=r"`a` must be a file in GGUF, got '.*bad\.gguf'"):
        open_model(tmp_path / "bad.gguf", argument="a")


class TestRefused:
    def quantized(self, folder: Path, **record) -> Path:
        stock_model("llama", torch.float32).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": record}))
        return folder

    def test_codes_without_the_library_that_made_them(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dequantized, "_is_installed", lambda package: False)
        for method in dequantized.PACKAGES:
            folder = self.quantized(tmp_path / method, quant_method=method, load_in_8bit=True)
            with pytest.raises(ValueError) as error:
                open_model(folder)
            assert f"`source` is quantized by {method!r}, and" in str(error.value)
            assert "is not installed, got" in str(error.value) and "\n" not in str(error.value)

    def test_codes_that_nobody_decodes_here(self, tmp_path):
        folder = self.quantized(tmp_path, quant_method="awq", bits=4)
        with pytest.raises(ValueError, match="must hold weights, or codes of bitsandbytes, torchao, .* says 'awq'"):
            open_model(folder)

    def test_a_class_that_does_not_convert(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": config["vocab_size"]}))
        with pytest.raises(ValueError, match="`model_type='bert'` cannot be converted"):
            open_model(tmp_path)

    def test_weights_that_are_not_those_of_the_configuration(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        del stored["model.layers.0.mlp.up_proj.weight"]
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"`b` must hold the weights of its .* lacks `model.layers.0"):
            open_model(tmp_path, argument="b")

    def test_code_of_the_folder(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}})
        )
        (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
        with pytest.raises(ValueError, match="`source` must .*asks for code from its folder"):
            open_model(tmp_path)


def test_the_way_to_rigpt_is_registered_from_above():
    assert opened._conversion is not None
    assert RiGPTForCausalLM.__module__.startswith("rigpt_hf.modeling")
