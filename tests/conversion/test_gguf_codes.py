"""GGUF files of models of codes: the codes in them are those of the source, not chosen anew."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from rigpt_hf.conversion.gguf import export_gguf
from rigpt_hf.conversion.gguf_grid import REACH, encoded, on_grid
from rigpt_hf.quantized_rigpt import RiGPTQuantizationConfig, to_quantized
from rigpt_hf.symmetry import GaugeTransformation
from tests.codes import codes_of, rounded
from tests.models import tiny_model, tokens

from .llama_cpp import opened


@pytest.mark.parametrize("kind", REACH)
@pytest.mark.parametrize("group", [32, 96])
def test_codes_are_found_again(kind, group):
    generator = np.random.default_rng(0)
    reach = REACH[kind]
    scales = (generator.random((40, 96 // group)) * 0.01).astype(np.float16)
    codes = generator.integers(-reach, reach, (40, 96))
    codes[0], codes[1, :32], codes[2, :32] = 0, np.arange(32) % 3, -reach
    numbers = (codes * np.repeat(scales.astype(np.float32), group, axis=1)).astype(np.float32)
    rounded_anew = gguf.quants.quantize(numbers, GGMLQuantizationType[kind])
    stored, is_exact = encoded(numbers, kind, rounded_anew)
    assert is_exact and np.array_equal(gguf.quants.dequantize(stored, GGMLQuantizationType[kind]), numbers)
    assert not np.array_equal(gguf.quants.dequantize(rounded_anew, GGMLQuantizationType[kind]), numbers)
    # A number beside the grid costs its own block, and no other.
    numbers[5, 40] *= 1.01
    changed, is_exact = encoded(numbers, kind, gguf.quants.quantize(numbers, GGMLQuantizationType[kind]))
    assert not is_exact and on_grid(numbers, kind)[2].sum() == 40 * 3 - 1
    differs = gguf.quants.dequantize(changed, GGMLQuantizationType[kind]) != numbers
    assert differs[5, 32:64].any() and differs.sum() == differs[5, 32:64].sum()


SIZES = {"hidden_size": 64, "gated_mlp": True, "hidden_act": "silu", "attention_output_bias": False, "mlp_bias": False}


def folder(tmp_path, group, tied=True, keep=(), gain=False):
    model = tiny_model(dtype=torch.float32, **SIZES, intermediate_size=96, tie_word_embeddings=tied)
    codes = codes_of(model, group, keep)
    for name in [] if gain else codes:
        codes[name] = rounded(model.get_submodule(name).weight, codes[name].bits, codes[name].group)
    made = to_quantized(model, codes, RiGPTQuantizationConfig(group=group))
    made.save_pretrained(tmp_path / "codes")
    return made


@pytest.mark.parametrize("group", [None, 32, 64])
def test_a_file_holds_the_codes_of_its_source(group, tmp_path, caplog):
    model = folder(tmp_path, group, tied=group != 64)
    certificate = export_gguf(tmp_path / "codes", tmp_path / "out", progress=False)
    assert "is quantized by rigpt (codes of 4 bits" in caplog.text and "were rounded" not in caplog.text
    assert "read back by Transformers" in certificate.target
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "out-codes.gguf").tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32", "Q4_0", "Q8_0"}
    held = gguf.quants.dequantize(tensors["blk.1.ffn_down.weight"].data, GGMLQuantizationType.Q4_0)
    assert np.array_equal(held, model.model.layers[1].mlp.down_proj.dense(torch.float32).numpy())
    table = gguf.quants.dequantize(tensors["token_embd.weight"].data, GGMLQuantizationType.Q8_0)
    assert np.array_equal(table, model.model.embed_tokens.dense(torch.float32).numpy())
    ids = tokens(1, 24)
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
    with opened(tmp_path / "out" / "out-codes.gguf", 32) as other:
        logits = other.logits(ids[0])
    found = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    # It rounds what it multiplies by codes to 8 bits.
    assert abs(found - wanted) < 0.01 * wanted


def test_what_is_no_code_is_rounded_and_said(tmp_path, caplog):
    folder(tmp_path, 32, keep=("model.layers.0.mlp.up_proj",), gain=True)
    certificate = export_gguf(tmp_path / "codes", tmp_path / "out", progress=False)
    assert "`blk.0.ffn_up.weight`" in caplog.text and "were rounded." in caplog.text
    assert "`blk.0.attn_output.weight`" in caplog.text and "ffn_gate" not in caplog.text
    assert "before its weights were rounded" in certificate.target and "Rounded to q8_0 the logits" in caplog.text


def test_codes_in_a_turned_frame_stay_and_the_tables_are_turned(tmp_path, caplog):
    model = tiny_model(dtype=torch.float64, **SIZES, intermediate_size=96, embedding_size=64)
    with torch.no_grad():
        model.model.project_in.weight.copy_(torch.eye(64))
        model.model.project_out.weight.copy_(
            torch.rand(64, generator=torch.Generator().manual_seed(0)).add(0.5).diag()
        )
    turned = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "stream")(model).float()
    ends = ("model.project_in", "model.project_out")
    for name, each in {"own": model.float(), "turned": turned}.items():
        codes = codes_of(each, 32, ends)
        for key in codes:
            codes[key] = rounded(each.get_submodule(key).weight, codes[key].bits, codes[key].group)
        to_quantized(each, codes, RiGPTQuantizationConfig(group=32)).save_pretrained(tmp_path / name)
        caplog.clear()
        export_gguf(tmp_path / name, tmp_path / f"{name}-out", progress=False)
        (file,) = (tmp_path / f"{name}-out").glob("*.gguf")
        kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
        maps = [kind for key, kind in kinds.items() if key.startswith("blk.") and kind != "F32"]
        assert set(maps) == {"Q4_0"} and len(maps) == 21
        # The lexical frame keeps one table and its codes; in another there are two, which are rounded once more.
        assert ("output.weight" in kinds) == (name == "turned")
        assert ("`output.weight`" in caplog.text and "`token_embd.weight`" in caplog.text) == (name == "turned")


def test_a_wish_for_other_digits_is_heeded(tmp_path):
    model = folder(tmp_path, 32)
    certificate = export_gguf(tmp_path / "codes", tmp_path / "out", dtype="float32", progress=False)
    assert "read back by Transformers" in certificate.target and model.config.tie_word_embeddings
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name == "out-F32.gguf"
