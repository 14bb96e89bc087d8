"""Folders of codes in the layout of compressed-tensors: the codes in them are those of the source."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rigpt_hf.checkpoints.certificate import CertificateError
from rigpt_hf.checkpoints.dequantized import dequantized
from rigpt_hf.checkpoints.opened import open_model
from rigpt_hf.checkpoints.pack_quantized import pack_words, unpack_words
from rigpt_hf.checkpoints.read import load_config
from rigpt_hf.conversion import compressed_tensors
from rigpt_hf.conversion.compressed_tensors import export_compressed_tensors
from rigpt_hf.conversion.families import TARGETS
from rigpt_hf.packed_rigpt import unpack
from rigpt_hf.quantized_rigpt import HEAD, TABLE, RiGPTQuantizationConfig, to_quantized
from rigpt_hf.symmetry import GaugeTransformation
from tests.checkpoints.folders import save_tokenizer
from tests.codes import codes_of, rounded
from tests.models import EXPERTS, tiny_model, tokens
from tests.tolerances import CONVERSION


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "gated_mlp": True,
    "hidden_act": "silu",
    "attention_output_bias": False,
    "mlp_bias": False,
}
FORMS = [(4, 32), (4, 64), (4, 128), (4, None), (8, 32), (8, None), (3, 32)]
MAPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MAPS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def coded(model, bits, group, keep=(), **fields):
    """The model made of codes without factors, whose first scales are negative."""
    codes = codes_of(model, group, keep)
    for name in codes:
        is_table = name in (TABLE, HEAD)
        form = (codes[name].bits, None) if is_table else (bits, group)
        codes[name] = rounded(model.get_submodule(name).weight, *form)
        if not is_table:
            codes[name].scales[0] *= -1
            assert codes[name].codes.unique().numel() > 4
    return to_quantized(model, codes, RiGPTQuantizationConfig(bits=bits, group=group, **fields))


def folder(place, bits=4, group=32, keep=(), dtype=torch.float32, **options):
    """The folder `codes`, and its model."""
    made = coded(tiny_model(dtype=dtype, **SIZES | options), bits, group, keep)
    made.save_pretrained(place / "codes")
    return made


def unpacked(words, bits, columns):
    """Codes by the bytes of the words, and not by shifting them."""
    parts = words.numpy().view(np.uint8)
    if bits == 4:
        parts = np.stack((parts % 16, parts // 16), axis=-1).reshape(len(parts), -1)
    return torch.from_numpy(parts[:, :columns].astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 13])
def test_words(bits, columns):
    reach = 2 ** (bits - 1)
    codes = torch.randint(-reach, reach, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[0], codes[1] = -reach, reach - 1
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpacked(words, bits, columns), codes) and torch.equal(
        unpack_words(words, bits, columns), codes
    )


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_codes_and_scales_are_those_of_the_source(bits, group, tmp_path, caplog):
    tied, dtype = group != 64, torch.bfloat16 if group == 32 else torch.float32
    model = folder(tmp_path, bits, group, tie_word_embeddings=tied, dtype=dtype)
    certificate = export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    assert certificate.relative_logit_error <= CONVERSION[torch.float32]
    assert "LlamaForCausalLM, decoded" in certificate.target and certificate.dtype in str(dtype)
    assert "is quantized by rigpt (codes of" in caplog.text and "could keep" not in caplog.text
    stored = load_file(tmp_path / "out" / "model.safetensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == [HEAD] and said["format"] == "pack-quantized"
    weights = said["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (max(bits, 4), group)
    assert weights["strategy"] == ("group" if group else "channel") and weights["symmetric"] is True
    seen = 0
    for layer in range(model.config.num_hidden_layers):
        for name in (f"model.layers.{layer}.{part}" for part in MAPS):
            source = model.get_submodule(name)
            codes = unpack(source.codes, source.shape[1])
            assert stored[f"{name}.weight_shape"].tolist() == list(source.shape)
            assert torch.equal(unpacked(stored[f"{name}.weight_packed"], max(bits, 4), source.shape[1]), codes)
            scales = stored[f"{name}.weight_scale"]
            assert torch.equal(scales.float(), source.scales.float()) and bool((scales[0] < 0).all())
            assert scales.dtype == (torch.float16 if dtype == torch.bfloat16 else torch.float32)
            seen += f"{name}.weight" not in stored
    assert seen == 21 and (f"{HEAD}.weight" in stored) != tied


@torch.no_grad()
def test_what_is_read_back_is_the_same_function_and_one_code_less_another(tmp_path):
    model = folder(tmp_path).eval()
    certificate = export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    assert certificate.max_abs_logit_error <= CONVERSION[torch.float32] * certificate.max_abs_logit
    expected = model(tokens(2, 9)).logits

    def logits():
        return dequantized(tmp_path / "out", load_config(tmp_path / "out")).load(None)(tokens(2, 9)).logits

    assert torch.allclose(logits(), expected, rtol=0, atol=CONVERSION[torch.float32] * float(expected.abs().max()))
    assert "is quantized by compressed-tensors" in open_model(tmp_path / "out").notes[0]
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.mlp.down_proj.weight_packed"][3, 2] ^= 1
    save_file(stored, path, metadata={"format": "pt"})
    assert (logits() - expected).abs().max() > 10 * CONVERSION[torch.float32] * expected.abs().max()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_the_library_of_the_layout_reads_the_same(bits, group, tmp_path):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    model = folder(tmp_path, bits, group).eval()
    export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    expected, config = model(tokens(2, 9)).logits, load_config(tmp_path / "out")
    config.quantization_config["dequantize"] = True
    for read in ({}, {"config": config}):
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **read).eval()(tokens(2, 9)).logits
        assert (logits - expected).abs().max() <= CONVERSION[torch.float32] * expected.abs().max()
    source = model.get_submodule("model.layers.0.mlp.up_proj")
    codes = unpack(source.codes, source.shape[1])
    words = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert torch.equal(helpers.pack_to_int32(codes, max(bits, 4)), words)
    assert torch.equal(helpers.unpack_from_int32(words, max(bits, 4), codes.shape), codes)


def test_a_class_that_joins_maps_keeps_their_codes(tmp_path):
    plain = {"attention_bias": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    model = folder(tmp_path, converted_from="phi3", **plain)
    export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found = unpacked(stored["model.layers.2.self_attn.qkv_proj.weight_packed"], 4, 128)
    parts = [model.get_submodule(f"model.layers.2.self_attn.{name}_proj") for name in "qkv"]
    assert torch.equal(found, torch.cat([unpack(part.codes, 128) for part in parts]))


def test_maps_without_codes_are_numbers_and_said(tmp_path, caplog):
    keep = ("model.layers.0.mlp.down_proj",)
    model = folder(tmp_path, keep=keep)
    export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    assert f"`{keep[0]}`: no codes that LlamaForCausalLM could keep" in caplog.text
    assert "Tables of tokens have no codes" in caplog.text
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(said["ignore"]) == {HEAD, *keep}
    assert torch.equal(stored[f"{keep[0]}.weight"], model.get_submodule(keep[0]).weight)


def test_codes_in_a_turned_frame_stay_and_the_tables_are_turned(tmp_path):
    model = tiny_model(dtype=torch.float64, **SIZES, embedding_size=128)
    with torch.no_grad():
        model.model.project_in.weight.copy_(torch.eye(128))
        gains = torch.rand(128, generator=torch.Generator().manual_seed(0)).add(0.5)
        model.model.project_out.weight.copy_(gains.diag())
    assert all(target.model_class.config_class.model_type == name for name, target in TARGETS.items())
    turned = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "stream")(model).float()
    made = coded(turned, 4, 32, ("model.project_in", "model.project_out"))
    made.save_pretrained(tmp_path / "codes")
    export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(name.endswith("weight_packed") for name in stored) == 21 and f"{HEAD}.weight" in stored
    with pytest.raises(
        ValueError, match="^`source` must have codes that a stock class can keep, got .* none of which"
    ):
        export_compressed_tensors(tmp_path / "codes", tmp_path / "other", frame="lexical")


def test_what_has_no_such_form_is_refused_in_one_line(tmp_path):
    weights = tiny_model(**SIZES)
    weights.save_pretrained(tmp_path / "weights")
    gains = to_quantized(weights, codes_of(weights), RiGPTQuantizationConfig(group=32))
    gains.save_pretrained(tmp_path / "gains")
    coded(weights, 4, 32, activation_bits=8).save_pretrained(tmp_path / "activations")
    coded(weights, 4, 32, cache_bits=4).save_pretrained(tmp_path / "cache")
    experts = {"moe_intermediate_size": 32, "attention_bias": False, "norm_topk_prob": True}
    coded(tiny_model(**SIZES | EXPERTS | experts), 4, 32).save_pretrained(tmp_path / "experts")
    turning = {"position_embedding_type": "learned", "hidden_act": "gelu_new", "gated_mlp": False}
    coded(tiny_model(**SIZES | turning), 4, 32).save_pretrained(tmp_path / "other")
    before = {path.name for path in tmp_path.iterdir()}
    for name, said in {
        "weights": "must be a folder of codes for `--to compressed-tensors`",
        "gains": "have factors of their inputs, which compressed-tensors has not. .* --tune 0`",
        "activations": "`activation_bits=8`, which is simulated",
        "cache": "`cache_bits=4`, which is simulated",
        "experts": "must have no experts for `--to compressed-tensors`",
        "other": "must be a class that has all options|must have codes that a stock class can keep",
    }.items():
        with pytest.raises(ValueError, match=said) as caught:
            export_compressed_tensors(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_codes_that_change_on_the_way_leave_nothing(tmp_path, monkeypatch):
    folder(tmp_path)

    def faulty(codes, bits):
        return pack_words(torch.where(torch.arange(codes.numel()).view(codes.shape) == 7, codes ^ 1, codes), bits)

    monkeypatch.setattr(compressed_tensors, "pack_words", faulty)
    with pytest.raises(CertificateError, match=r"^`model\.layers\.0\..*` must be read back as it is in the source"):
        export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"codes"}


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    folder(tmp_path)
    export_compressed_tensors(tmp_path / "codes", tmp_path / "out")
    path, name = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.up_proj"
    whole = load_file(path)
    for part, changed, said in (
        ("weight_scale", None, "must hold all parts of a map, got .* without"),
        ("weight_scale", whole[f"{name}.weight_scale"][:-1], "must hold codes of 4 bits and their scales"),
        ("weight_packed", whole[f"{name}.weight_packed"][:, :-1], "must hold codes of 4 bits and their scales"),
        ("weight_shape", torch.tensor([256]), "must hold codes of 4 bits and their scales"),
        ("weight_shape", whole[f"{name}.weight_shape"].float(), "must hold codes of 4 bits and their scales"),
        ("weight_scale", whole[f"{name}.weight_scale"][:, :0], "must hold codes of 4 bits and their scales"),
        ("weight_scale", whole[f"{name}.weight_scale"] * torch.inf, "must hold finite numbers"),
    ):
        stored = {key: tensor.contiguous() for key, tensor in whole.items() if key != f"{name}.{part}"}
        stored |= {} if changed is None else {f"{name}.{part}": changed.contiguous()}
        save_file(stored, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said) as caught:
            open_model(tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_the_verb(tmp_path, monkeypatch, capsys):
    from rigpt_hf import cli

    folder(tmp_path)
    save_tokenizer(tmp_path / "codes")
    for times, code in (1, 0), (2, 2):
        arguments = ["export", tmp_path / "codes", tmp_path / "out", "--to", "compressed-tensors"]
        monkeypatch.setattr("sys.argv", ["rigpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert (stop.value.code or 0) == code and ("equal up to rounding" in said.out) == (times == 1)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {
        "config.json",
        "model.safetensors",
        "certificate.json",
        "tokenizer.json",
        "generation_config.json",
    }
