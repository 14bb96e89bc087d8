"""ONNX graphs, held against the model by ONNX Runtime: with and without a past, in batches, with padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import Certificate, onnx
from rigpt_hf.conversion.onnx import export_onnx, run_in_steps, trace

from ..checkpoints.folders import contents, save_tokenizer
from ..models import ALL, OPTIONS, noisy, tiny_model, tokens
from ..tolerances import CONVERSION, RUNTIME


pytest.importorskip("onnxscript", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
# Everything at once that a native model has: learned frequencies would leave no table of rotations to trace.
NATIVE = OPTIONS["recipe"] | {"local_frames": True, "embedding_size": 24, "output_bias": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("onnx") / "model"
    tiny_model(dtype=torch.float32, **NATIVE).save_pretrained(place)
    save_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def graphs() -> list[Any]:
    """Every graph that `exported` traced: to trace one takes longer than all else here."""
    return []


@pytest.fixture(scope="module")
def exported(saved, graphs) -> tuple[Path, Certificate]:
    def traced(model: RiGPTForCausalLM) -> Any:
        graphs.append(trace(model))
        return graphs[-1]

    out = saved.parent / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx, "trace", traced)
        return out, export_onnx(saved, out)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_sources_in_other_dtypes(dtype, tmp_path):
    tiny_model(dtype=torch.bfloat16 if dtype is None else torch.float64).save_pretrained(tmp_path / "model")
    certificate = export_onnx(tmp_path / "model", tmp_path / "out", dtype=dtype)
    assert certificate.passed and certificate.dtype == ("float32" if dtype is None else "float16")


def empty(model: RiGPTForCausalLM, batch: int) -> DynamicCache:
    nothing = torch.zeros(batch, model.config.num_key_value_heads, 0, model.config.head_dim)
    return DynamicCache([(nothing, nothing)] * model.config.num_hidden_layers)


def relative(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((logits - wanted).abs().max() / wanted.abs().max())


@pytest.mark.full
def test_a_folder_with_a_graph_and_its_certificate(exported):
    out, certificate = exported
    assert {"model.onnx", "model.onnx.data", "export.json", "config.json", "tokenizer.json"} <= contents(out)
    assert certificate.passed and Certificate.load(out) == certificate
    assert 0 < certificate.relative_logit_error <= CONVERSION[torch.float32]
    assert "by ONNX Runtime, through its cache" in certificate.target
    assert not list(out.glob("*.safetensors"))


@torch.no_grad()
@pytest.mark.full
def test_batches_of_any_size_with_a_past_or_without(saved, exported):
    from transformers.exporters import ExportedModel

    model, graph = RiGPTForCausalLM.from_pretrained(saved), ExportedModel.from_pretrained(exported[0], device="cpu")
    for batch, steps in ((1, [1, 1, 1]), (1, [17]), (3, [9, 1, 4]), (5, [2])):
        ids = tokens(batch, sum(steps))
        wanted, cache, first = model(ids).logits, empty(model, batch), 0
        for part in ids.split(steps, dim=1):
            last = first + part.shape[1]
            given = {
                "attention_mask": torch.ones(batch, last, dtype=torch.long),
                "position_ids": torch.arange(first, last).expand(batch, -1).contiguous(),
            }
            outputs = graph(input_ids=part.contiguous(), past_key_values=cache, **given)
            assert relative(outputs.logits, wanted[:, first:last]) <= RUNTIME
            cache, first = outputs.past_key_values, last
        assert cache.get_seq_length() == sum(steps)


@torch.no_grad()
@pytest.mark.full
def test_padding_on_the_left(saved, exported):
    """By ONNX Runtime alone, as a program without Transformers runs it."""
    model = RiGPTForCausalLM.from_pretrained(saved)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = model(ids[:1, 5:]).logits
    assert relative(wanted[:1, 5:], alone) <= RUNTIME
    session = ort.InferenceSession(exported[0] / "model.onnx", providers=["CPUExecutionProvider"])
    shape = (2, model.config.num_key_value_heads, 0, model.config.head_dim)
    past = {one.name: torch.zeros(shape).numpy() for one in session.get_inputs() if "past_key_values" in one.name}
    assert len(past) == 2 * model.config.num_hidden_layers
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits, *_ = session.run(None, {name: tensor.numpy() for name, tensor in given.items()} | past)
    assert relative(torch.from_numpy(logits)[mask.bool()], wanted[mask.bool()]) <= RUNTIME
    given["attention_mask"] = torch.ones_like(mask)  # or the mask would not be looked at
    logits, *_ = session.run(None, {name: tensor.numpy() for name, tensor in given.items()} | past)
    assert relative(torch.from_numpy(logits)[mask.bool()], wanted[mask.bool()]) > 0.01


@pytest.mark.usefixtures("exported")
@pytest.mark.full
def test_another_function_does_not_appear(saved, graphs, tmp_path, monkeypatch):
    (graph,) = graphs
    noisy(RiGPTForCausalLM.from_pretrained(saved), 0.1).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    monkeypatch.setattr(onnx, "trace", lambda model: graph)
    assert export_onnx(saved, tmp_path / "same").passed
    with pytest.raises(ValueError, match="the two models are not the same function"):
        export_onnx(tmp_path / "other", tmp_path / "out")

    def fails(model: Any) -> Any:
        raise RuntimeError("Could not guard on data-dependent expression\nUser code: here")

    monkeypatch.setattr(onnx, "trace", fails)
    with pytest.raises(
        ValueError, match="^`source` must be a model that torch.export can trace .* data-dependent"
    ) as caught:
        export_onnx(saved, tmp_path / "out")
    assert "\n" not in str(caught.value) and contents(tmp_path) == {"other", "same"}


@pytest.mark.full
def test_what_is_foreign_is_not_replaced(saved, exported):
    out, _ = exported
    with pytest.raises(ValueError, match="`output_dir` must be empty or absent"):
        export_onnx(saved, out)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="can be replaced only if all in it was written by this program"):
        export_onnx(saved, out, force=True)
    (out / "mine.txt").unlink()


def test_what_onnx_runtime_does_not_compute_in_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="^`dtype` must be one of float32, float16 for ONNX Runtime, got 'bfloat16'"):
        export_onnx(saved, tmp_path / "out", dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_a_network_of_steps_is_refused(tmp_path):
    tiny_model(depth_solver="euler").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="^`source` must be a network of layers .* with `depth_solver='euler'`"):
        export_onnx(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("option", ["sliding", "experts"])
def test_what_the_exporter_cannot_trace_is_refused(option, tmp_path):
    tiny_model(**ALL[option]).save_pretrained(tmp_path / "model")
    name = {"sliding": "sliding_window=5", "experts": "num_experts=4"}[option]
    with pytest.raises(ValueError, match=f"^`source` must be a network that .* with `{name}`: .*--to auto"):
        export_onnx(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


UNTRACED = {"depth_solver", "sliding_window", "num_experts"}
LAYERED = [name for name, options in ALL.items() if not UNTRACED & options.keys()]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERED)
@torch.no_grad()
def test_every_other_option_is_traced(name, tmp_path):
    model = tiny_model(dtype=torch.float32, **ALL[name])
    model.save_pretrained(tmp_path / "model")
    assert export_onnx(tmp_path / "model", tmp_path / "out").passed
    ids = tokens(3, 14)
    assert relative(run_in_steps(tmp_path / "out", model, ids), model(ids).logits) <= RUNTIME
