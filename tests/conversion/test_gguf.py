"""GGUF files, held against llama.cpp itself: the function, what is refused, and what lies on disk."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import nn
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    ArceeConfig,
    ArceeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rigpt_hf.checkpoints.write import Entry
from rigpt_hf.conversion import Certificate, convert_model, gguf_file
from rigpt_hf.conversion.export import ExportPlan
from rigpt_hf.conversion.families import TARGETS
from rigpt_hf.conversion.gguf import export_gguf, plan_for_llama_cpp
from rigpt_hf.conversion.gguf_file import ARCHITECTURES, GGUF_DTYPES, check_known, read_gguf, write_gguf
from rigpt_hf.symmetry import GaugeTransformation

from ..checkpoints.folders import contents, save_tokenizer
from ..models import randomise_, tiny_model, tokens
from ..tolerances import RUNTIME, RUNTIME_TABLE
from .families import converted_family
from .llama_cpp import opened
from .sources import SIZES, SOURCES, TOKENS, converted_pair, stock_model


# Those that a GGUF file can say.
EXPRESSED = [
    *("gpt2", "gpt2-untied", "gpt2-unscaled-layer-scaled", "gpt2-inner"),
    *("llama", "llama-tied-biases", "llama-head-dim", "llama-multi-query", "mistral"),
    *("llama-rope-linear", "llama-rope-yarn", "llama-rope-llama3"),
    *("qwen2", "qwen2-tied"),
]
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "arcee": (ArceeForCausalLM, ArceeConfig, {"head_dim": 10}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 10}),
    "apertus": (ApertusForCausalLM, ApertusConfig, {"mlp_bias": True, "rope_parameters": DEFAULT_ROPE}),
}
LENGTH = 32


def plan_of(model: Any) -> ExportPlan:
    """A stock model as if it had been exported."""
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    entries = [
        Entry(name, tuple(tensor.shape), lambda dtype, tensor=tensor: tensor.to(dtype, copy=True))
        for name, tensor in state.items()
    ]
    return ExportPlan(type(model), model.config, tuple(entries))


class Table(nn.Module):
    """An activation as llama.cpp has it: read from a table of halves, except far out."""

    def __init__(self, exact: nn.Module):
        super().__init__()
        self.exact = exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.exact(x.half().float()).half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, read))


def as_llama_cpp(model: Any) -> Any:
    """The same model, with llama.cpp's activation."""
    if model.config.model_type == "gpt2":
        for layer in model.transformer.h:
            layer.mlp.act = Table(layer.mlp.act)
    return model


@torch.no_grad()
def error(model: Any, path: Path) -> float:
    """Between a stock model and llama.cpp, at once and through the cache, relative to the largest logit."""
    ids = tokens(1, LENGTH)
    wanted = model(ids).logits[0]
    with opened(path, 2 * LENGTH) as other:
        whole = other.logits(ids[0])
        parts = [
            other.logits(ids[0, :20]),
            other.logits(ids[0, 20:21], kept=True),
            other.logits(ids[0, 21:], kept=True),
        ]
    found = max(float((logits - wanted).abs().max() / wanted.abs().max()) for logits in (whole, torch.cat(parts)))
    print(f"{found:.2e} of {float(wanted.abs().max()):.3g}")
    return found


@pytest.mark.parametrize("name", EXPRESSED)
@pytest.mark.by_default(4)
def test_llama_cpp_computes_the_same_function(name, tmp_path):
    source, converted = converted_pair(name)
    generator = torch.Generator().manual_seed(0)
    # Heads that are stretched lose digits, with which more numbers go to the other entry of a table.
    frames = ("stream",) if name.startswith("gpt2") else ("stream", "head")
    turned = GaugeTransformation.random(converted.config, generator, frames)(converted)
    plan = plan_for_llama_cpp(turned, "turned")
    assert plan.config.tie_word_embeddings == source.config.tie_word_embeddings
    write_gguf(plan, tmp_path / "it.gguf", "float32", None, "it")
    source = stock_model(name, torch.float32)
    plain = error(source, tmp_path / "it.gguf")
    if name.startswith("gpt2"):
        table = error(as_llama_cpp(source), tmp_path / "it.gguf")
        assert table <= RUNTIME_TABLE and table < 0.5 * plain  # the table is what differs
    else:
        assert plain <= RUNTIME


@pytest.mark.parametrize(
    "name, tied",
    [
        pytest.param(name, tied, marks=[pytest.mark.full] * (tied and name != min(OTHERS)))
        for name in OTHERS
        for tied in (False, True)
    ],
)
def test_other_classes_that_it_knows(name, tied, tmp_path):
    model_class, config_class, options = OTHERS[name]
    torch.manual_seed(0)
    config = config_class(**(SIZES | TOKENS | options), tie_word_embeddings=tied)
    model = randomise_(model_class(config), 0).eval()
    write_gguf(plan_of(model), tmp_path / "it.gguf", "float32", None, "it")
    assert error(model, tmp_path / "it.gguf") <= RUNTIME
    held = {tensor.name for tensor in GGUFReader(tmp_path / "it.gguf").tensors}
    assert ("output.weight" in held) == (not tied or not ARCHITECTURES[name].tied)


def test_biases_that_it_does_not_read_are_refused():
    for name in ("arcee", "qwen3"):
        _, config_class, options = OTHERS[name]
        check_known(config_class(**(SIZES | TOKENS | options)))
        with pytest.raises(
            ValueError, match=f"^`attention_bias` must be False: llama.cpp's '{name}' has maps without"
        ):
            check_known(config_class(**(SIZES | TOKENS | options | {"attention_bias": True})))


def test_windows_are_refused():
    """llama.cpp's layers of these classes see everything before them, and a file has no word for it."""
    for name in ("qwen2-window", "mistral-window", "qwen3-window"):
        with pytest.raises(ValueError, match="`source` must be .* `sliding_window` must be None, got 8"):
            plan_for_llama_cpp(converted_family(name)[1], "A")


@pytest.mark.parametrize(
    "name, reason",
    [("gemma2", "not llama: .*`attn_logit_softcapping=3.0`"), ("phi", "not arcee: .*`use_parallel_residual=True`")],
)
def test_classes_that_a_file_is_not_written_of_are_refused(name, reason):
    """However many classes a model is exported to: files of these architectures alone are held against llama.cpp."""
    with pytest.raises(ValueError, match=rf"^`source` must be .*, got 'A', which is none: .*{reason}") as caught:
        plan_for_llama_cpp(converted_family(name)[1], "A")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


# Options, and the class that llama.cpp runs in the place of such a model.
BARE = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}
NATIVE: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"gated_mlp": True, "hidden_act": "silu", "tie_word_embeddings": False}, "llama"),
    "relu2": (BARE | {"hidden_act": "relu2", "embedding_norm": True}, "arcee"),
    "relu2-qk-norm": (BARE | {"hidden_act": "relu2", "qk_norm": True}, "apertus"),
}


@pytest.mark.parametrize("options, kind", NATIVE.values(), ids=NATIVE)
def test_a_native_model_finds_its_class(options, kind, tmp_path):
    if kind not in TARGETS:
        pytest.skip(f"no export to {kind} yet")
    model = tiny_model(**options)
    plan = plan_for_llama_cpp(model, "A")
    assert plan.config.model_type == kind
    write_gguf(plan, tmp_path / "it.gguf", "float32", None, "it")
    assert error(model, tmp_path / "it.gguf") <= RUNTIME


def test_every_class_is_run():
    assert {*ARCHITECTURES} == {name.split("-")[0] for name in (*EXPRESSED, *OTHERS)} - {"mistral"}


def test_rows_that_are_not_paired_anew_are_another_function(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], neighbours=False))
    model = stock_model("llama", torch.float32)
    write_gguf(plan_of(model), tmp_path / "it.gguf", "float32", None, "it")
    assert error(model, tmp_path / "it.gguf") > 0.1


def test_factors_that_are_left_out_are_another_function(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], factors=False))
    monkeypatch.setattr(gguf_file, "check_known", lambda config: ARCHITECTURES[config.model_type])
    model = stock_model("llama-rope-llama3", torch.float32)
    write_gguf(plan_of(model), tmp_path / "it.gguf", "float32", None, "it")
    assert error(model, tmp_path / "it.gguf") > 0.01


def test_square_maps_of_gpt2_that_are_not_transposed_are_another_function(tmp_path, monkeypatch):
    recipe = gguf_file._recipe

    def square_as_they_are(entry, transposed, head):
        return recipe(entry, transposed and "attn.c_proj" not in entry.name, head)

    monkeypatch.setattr(gguf_file, "_recipe", square_as_they_are)
    model = stock_model("gpt2", torch.float32)
    write_gguf(plan_of(model), tmp_path / "it.gguf", "float32", None, "it")
    assert error(as_llama_cpp(model), tmp_path / "it.gguf") > 0.1


@pytest.mark.parametrize("name", ["gpt2-relu", "llama-gelu"])
def test_an_activation_that_a_file_cannot_say_is_refused(name, tmp_path, monkeypatch):
    model = stock_model(name, torch.float32)
    said = "activation_function" if name.startswith("gpt2") else "hidden_act"
    got = getattr(model.config, said)
    with pytest.raises(ValueError, match=f"`{said}` must be '.*', got '{got}': a GGUF file does not"):
        write_gguf(plan_of(model), tmp_path / "it.gguf", "float32", None, "it")
    with pytest.raises(
        ValueError, match=f"^`source` must be a model that llama.cpp can run, got 'A', which is none: not .*: `{said}`"
    ):
        plan_for_llama_cpp(converted_pair(name)[1], "A")
    monkeypatch.setattr(gguf_file, "check_known", lambda config: ARCHITECTURES[config.model_type])
    write_gguf(plan_of(model), tmp_path / "it.gguf", "float32", None, "it")
    assert error(model, tmp_path / "it.gguf") > 0.01  # llama.cpp computes another in silence


def test_rotations_that_a_file_cannot_say_are_refused():
    for name, options, said in (
        (
            "llama-rope-dynamic",
            {},
            r"\(default, linear, yarn, llama3\), with the library's own constants, got 'dynamic'",
        ),
        ("llama-rope-yarn", {"attention_factor": 1.5}, "constants, got `attention_factor`"),
    ):
        config = stock_model(name).config
        config.rope_parameters = config.rope_parameters | options
        with pytest.raises(
            ValueError, match=f"^`rope_parameters` must be of a type that a GGUF file of 'llama' .*{said}"
        ):
            check_known(config)
    config = stock_model("qwen2").config
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 500.0}
    with pytest.raises(ValueError, match=r"of 'qwen2' can say \(default, linear, yarn\)"):
        check_known(config)


def test_a_model_that_no_class_expresses_is_refused_with_the_nearest_reasons():
    with pytest.raises(ValueError, match="got 'A', which is none: not arcee: .*; not llama: .* `--to onnx`") as caught:
        plan_for_llama_cpp(tiny_model(qk_norm=True), "A")
    said = str(caught.value)
    assert said.count("`qk_norm=True`") >= 2 and "\n" not in said and "which has" not in said and "Try" not in said


# What a weight may change by, in units of the largest of its 32: half a step, and the digits of the scale.
STEPS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11}


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, marks=[pytest.mark.full] * (name == "gpt2" and dtype != "q8_0"))
        for name in ("gpt2", "llama")
        for dtype in GGUF_DTYPES
    ],
)
@pytest.mark.by_default(3)
def test_weights_are_those_of_the_stock_model(name, dtype, tmp_path, caplog):
    model = stock_model(name, torch.float32, **({"n_inner": 64} if name == "gpt2" else {}))
    wide = type(model)(type(model.config)(**(model.config.to_dict() | WIDE[name])))
    model = randomise_(wide, 0).eval()
    plan = plan_of(model)
    write_gguf(plan, tmp_path / "it.gguf", dtype, None, "it")
    held = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "it.gguf").tensors}
    kinds = {tensor.tensor_type.name for tensor in held.values()}
    assert GGUF_DTYPES[dtype] in kinds
    # Vectors stay as they are, rows that are no multiple of 32 go into halves, and tables have more digits.
    assert all(tensor.tensor_type.name == "F32" for tensor in held.values() if len(tensor.shape) == 1)
    rounded = dtype in gguf_file.ROUNDED
    assert ("F16" in kinds) == (rounded or dtype == "float16")
    assert ("`blk.0.ffn_down.weight`" in caplog.text and "stored in float16" in caplog.text) == rounded
    assert held["token_embd.weight"].tensor_type.name == ("Q8_0" if rounded else GGUF_DTYPES[dtype])
    if name == "llama":
        assert held["output.weight"].tensor_type.name == held["token_embd.weight"].tensor_type.name
    back = read_gguf(tmp_path / "it.gguf", plan, torch.float32).state_dict()
    changed = 0
    for key, tensor in model.state_dict().items():
        step = max(STEPS[kind] for kind in kinds)
        assert (back[key] - tensor).abs().max() <= step * tensor.abs().max()
        changed += not torch.equal(back[key], tensor)
    assert (changed > 5) == (dtype != "float32")
    for tensor in held.values():  # and block by block as llama.cpp will read them
        assert np.isfinite(dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))).all()
    if name == "llama":
        # llama.cpp also rounds what it multiplies by rounded weights.
        assert error(read_gguf(tmp_path / "it.gguf", plan, torch.float32).eval(), tmp_path / "it.gguf") < 0.1


WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_inner": 40},
    "llama": {"hidden_size": 32, "head_dim": 8, "intermediate_size": 40},
}


def test_one_tensor_at_a_time(tmp_path):
    model = stock_model("llama", torch.float32)
    made: list[weakref.ref] = []
    most = 0

    def counted(entry: Entry) -> Entry:
        def make(dtype: torch.dtype) -> torch.Tensor:
            nonlocal most
            tensor = entry.make(dtype)
            made.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in made))
            return tensor

        return Entry(entry.name, entry.shape, make)

    plan = plan_of(model)
    write_gguf(replace(plan, entries=tuple(map(counted, plan.entries))), tmp_path / "it.gguf", "q8_0", None, "it")
    assert len(made) == len(plan.entries) and 1 <= most <= 2


def test_numbers_beyond_a_half_are_refused(tmp_path):
    model = stock_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 7e4
    plan = plan_of(model)
    write_gguf(plan, tmp_path / "it.gguf", "bfloat16", None, "it")
    with pytest.raises(ValueError, match="weights .* in F16, and `blk.1.ffn_up.weight` would not be"):
        write_gguf(plan, tmp_path / "again.gguf", "float16", None, "it")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A converted Llama, tied, in a turned frame; without a tokenizer."""
    place = tmp_path_factory.mktemp("gguf") / "model"
    converted = convert_model(stock_model("llama-tied", torch.float32))
    turned = GaugeTransformation.random(converted.config, torch.Generator().manual_seed(0), ("stream",))(converted)
    turned.save_pretrained(place)
    return place


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "q8_0"])
def test_a_folder_with_one_file_and_its_certificate(saved, dtype, tmp_path, caplog):
    certificate = export_gguf(saved, tmp_path / "out", dtype=dtype, progress=False)
    file = f"out-{GGUF_DTYPES[dtype or 'float32']}.gguf"
    assert contents(tmp_path / "out") == {file, "certificate.json", ".rigpt-written.json"}
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    assert certificate.dtype == ("float32" if dtype in (None, "q8_0") else dtype)
    how = "before its weights were rounded" if dtype == "q8_0" else "read back by Transformers"
    assert certificate.target == f"{tmp_path / 'out' / file} (LlamaForCausalLM, {how})"
    assert ("Rounded to q8_0 the logits change by " in caplog.text) == (dtype == "q8_0")
    assert "has no tokenizer" in caplog.text
    with opened(tmp_path / "out" / file, LENGTH) as other:
        assert other.vocab_size == SIZES["vocab_size"]


def test_a_file_that_is_wrong_does_not_appear(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], neighbours=False))
    with pytest.raises(ValueError, match="the two models are not the same function"):
        export_gguf(saved, tmp_path / "deep" / "out", progress=False)
    assert contents(tmp_path) == set()


def test_what_is_foreign_is_not_replaced(saved, tmp_path):
    out = tmp_path / "out"
    export_gguf(saved, out, progress=False)
    with pytest.raises(ValueError, match="`output_dir` must be empty or absent"):
        export_gguf(saved, out, dtype="q8_0", progress=False)
    export_gguf(saved, out, dtype="q8_0", force=True, progress=False)
    assert contents(out) == {"out-Q8_0.gguf", "certificate.json", ".rigpt-written.json"}
    (out / "mine.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="can be replaced only if all in it was written by this program .* mine.gguf"):
        export_gguf(saved, out, force=True, progress=False)
    assert (out / "mine.gguf").read_bytes() == b"GGUF" and (out / "out-Q8_0.gguf").is_file()


def test_a_head_of_its_own_is_said_in_bytes(tmp_path, caplog):
    model = convert_model(stock_model("llama-tied", torch.float32))
    with torch.no_grad():
        model.model.project_out.weight += 0.1 * torch.randn_like(model.model.project_out.weight)
    model.save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out", dtype="float16", progress=False)
    more = SIZES["vocab_size"] * SIZES["hidden_size"]
    assert f"{more:,} numbers more, {2 * more:,} bytes." in caplog.text
    held = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "out-F16.gguf").tensors}
    assert held["output.weight"].n_bytes == 2 * more


def test_other_dtypes_and_tokenizers_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be one of float32, .*, q4_0, got 'float64', which GGUF lacks"):
        export_gguf(saved, tmp_path / "out", dtype="float64")
    converted_pair("llama-tied", torch.float32)[1].save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(
        ValueError, match="^`source` must have a tokenizer that llama.cpp has too: its algorithm is WordLevel"
    ):
        export_gguf(tmp_path / "model", tmp_path / "out", progress=False)
    assert contents(tmp_path) == {"model"}


def test_the_verb(saved, tmp_path, monkeypatch, capsys):
    from rigpt_hf import cli

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["rigpt", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out + captured.err.replace("\r", "\n")

    code, said = run(saved, tmp_path / "out", "--to", "gguf", "--dtype", "q8_0")
    assert code == 0 and "equal up to rounding" in said and json.loads((tmp_path / "out/certificate.json").read_text())
    code, said = run(saved, tmp_path / "other", "--to", "llama", "--dtype", "q8_0")
    assert (
        code == 2
        and "`--dtype` must be one of float64, float32, bfloat16, float16, got 'q8_0', which `--to gguf`" in said
    )
    assert {*SOURCES} >= {*EXPRESSED}
