"""Gains behind the normalisation of queries and keys: as vectors, as metrics, and back to the class they came from."""

import logging

import pytest
import torch
from transformers import Qwen3ForCausalLM

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.weights import Weights
from rigpt_hf.conversion import Certificate, certify, convert_checkpoint, convert_model, export_model
from rigpt_hf.conversion.families import ARCHITECTURES
from rigpt_hf.conversion.gains import metric_maps
from rigpt_hf.conversion.plan import make_plan
from rigpt_hf.symmetry import GaugeTransformation, gauge_error

from ..models import DTYPES, tiny_model, tokens
from ..tolerances import CONVERSION, SYMMETRY
from .families import family_model


NAMES = ("qwen3", "qwen3-tied")
FORMS = ("vector", "metric")
# Every head has gains of its own; all heads have norms with biases.
OF_EACH, BIASED = ("cohere-heads", "stablelm-heads"), ("phi-heads", "persimmon")
OWN = [("vector", name) for name in OF_EACH]
# What neither form lets turn freely and neither export asks about.
OUTSIDE = ["stream", "head_vo", "heads", "neurons"]
over_forms = pytest.mark.parametrize("form", FORMS)


def turned(model: RiGPTForCausalLM, frames, seed: int = 1) -> RiGPTForCausalLM:
    return GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed), frames)(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_forms
@pytest.mark.parametrize("name", [*NAMES, "gemma3_text", "olmo2", "olmo3-tied", *OF_EACH, *BIASED])
@pytest.mark.by_default(9)
def test_both_forms_are_the_same_function_in_every_frame(name, form, dtype):
    source = family_model(name, dtype)
    converted = convert_model(source, qk_gain=form)
    assert converted.config.qk_norm_gain == ("vector_per_head" if (form, name) in OWN else form)
    assert converted.config.qk_norm_bias is (name in BIASED)
    certificate = certify(source, converted, tokens(2, 36))
    print(f"{name}, {form}: {certificate.relative_logit_error:.1e}")
    assert certificate.relative_logit_error <= CONVERSION[dtype] and certificate.max_abs_logit > 0.1
    g = GaugeTransformation.random(converted.config, torch.Generator().manual_seed(1), "all")
    assert gauge_error(converted, g, tokens(2, 36)) <= SYMMETRY[dtype]


@over_forms
@pytest.mark.parametrize("name", NAMES)
def test_a_qwen3_comes_back(name, form):
    """With gains as vectors from every frame, with metrics as long as heads of queries and keys have not turned."""
    source = family_model(name)
    model = turned(convert_model(source, qk_gain=form), "all" if form == "vector" else OUTSIDE)
    back = export_model(model, "qwen3")
    assert type(back) is Qwen3ForCausalLM and back.state_dict().keys() == source.state_dict().keys()
    error = certify(source, back, tokens(2, 36)).relative_logit_error
    print(f"{name}, {form}: {error:.1e}")
    assert error <= CONVERSION[torch.float64]
    if form == "metric":
        for gain in ("q_norm", "k_norm"):
            pair = [getattr(each.model.layers[1].self_attn, gain).weight for each in (source, back)]
            assert (pair[1] - pair[0].abs()).abs().max() <= CONVERSION[torch.float64] * pair[0].abs().max()


def test_a_metric_that_is_no_gain_is_refused():
    model = convert_model(family_model("qwen3"), qk_gain="metric")
    with pytest.raises(ValueError, match="`qk_norm_gain='metric'` has no counterpart.* of queries in layer 0 are"):
        export_model(turned(model, ["head_qk"]), "qwen3")
    with torch.no_grad():  # diagonal, but not the same in all heads
        model.model.layers[2].self_attn.k_norm.weight[:10] *= 1.5
    with pytest.raises(ValueError, match="those of keys in layer 2 are .* away"):
        export_model(model, "qwen3")


@pytest.mark.parametrize("gain", [None, "vector", "metric"])
def test_a_model_of_our_own_becomes_a_qwen3(gain):
    """With norms without gains, which are gains of 1, and with new metrics."""
    model = tiny_model(qk_norm=True, qk_norm_gain=gain, gated_mlp=True, hidden_act="relu2", mlp_bias=False)
    if gain == "metric":
        for layer in model.model.layers:
            layer.self_attn.q_norm.reset_own_parameters()
            layer.self_attn.k_norm.reset_own_parameters()
    with torch.no_grad():
        for layer in model.model.layers:  # the class has one bias for all four maps, which it may have
            assert layer.self_attn.o_proj.bias is not None
    back = export_model(model, "qwen3")
    assert certify(model, back, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    assert (back.model.layers[0].self_attn.q_norm.weight == 1).all() == (gain != "vector")


def test_what_a_qwen3_has_not_is_named():
    for options, message in (
        ({"gated_mlp": True, "mlp_bias": False}, "`qk_norm=False` has no counterpart in Qwen3"),
        ({"qk_norm": True, "mlp_bias": False}, "`gated_mlp=False` has no counterpart in Qwen3"),
        ({"qk_norm": True, "gated_mlp": True}, "`mlp_bias=True` has no counterpart in Qwen3"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(tiny_model(**options), "qwen3")
    with pytest.raises(ValueError, match="`qk_norm=True` and `qk_norm_gain='vector'` have no counterpart in Llama"):
        export_model(convert_model(family_model("qwen3")), "llama")


@pytest.mark.parametrize("smallest", [0.0, 1e-4])
def test_gains_that_no_metric_can_have_stay_vectors_and_are_named(smallest, caplog):
    source = family_model("qwen3")
    with torch.no_grad():
        source.model.layers[1].self_attn.k_norm.weight[3] = smallest
    with caplog.at_level(logging.WARNING):
        converted = convert_model(source, qk_gain="metric")
    assert converted.config.qk_norm_gain == "vector"
    assert "gains stay vectors, as those of 'model.layers.1.self_attn.k_norm.weight' reach from" in caplog.text
    assert certify(source, converted, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]


@over_forms
def test_what_became_of_gains_is_said_to_who_asked(form, caplog):
    with caplog.at_level(logging.WARNING):
        convert_model(family_model("qwen3"), qk_gain=form)
    assert ("gains of queries and keys became metrics" in caplog.text) is (form == "metric")


def test_gains_that_heads_do_not_share_go_to_no_class_that_shares_them():
    options = {"qk_norm": True, "gated_mlp": True, "hidden_act": "silu", "mlp_bias": False}
    for own in ({"qk_norm_gain": "vector_per_head"}, {"qk_norm_gain": "vector", "qk_norm_bias": True}):
        option, value = list(own.items())[-1]
        with pytest.raises(ValueError, match=f"`{option}={value!r}` has no counterpart in Qwen3"):
            export_model(tiny_model(**options, **own), "qwen3")
    own = tiny_model(**options, qk_norm_gain="vector_per_head")
    state = own.state_dict()
    for name in [name for name in state if "_norm." in name]:
        state[name] = metric_maps(state[name], len(state[name]), 8, torch.float64)
    metric = RiGPTForCausalLM(RiGPTConfig(**(own.config.to_dict() | {"qk_norm_gain": "metric"}))).double().eval()
    metric.load_state_dict(state)
    with pytest.raises(ValueError, match="has no counterpart.* of queries in layer 0 are .* the same in all heads"):
        export_model(metric, "qwen3")


def test_a_head_without_its_norm_is_named():
    source = family_model("stablelm-heads")
    for left_out, message in (
        (0, "`model.layers.1.self_attn.q_layernorm.norms.0.weight` is missing from the source"),
        (2, "`model.layers.1.self_attn.q_layernorm.norms.2.weight` is missing from the source"),
        (3, r"`model.layers.1.self_attn.q_norm.weight` must have shape \[24\] .* its weights give \[18\]"),
    ):
        state = source.state_dict()
        del state[f"model.layers.1.self_attn.q_layernorm.norms.{left_out}.weight"]
        with pytest.raises(ValueError, match=message):
            plan = make_plan(ARCHITECTURES["stablelm"], source.config, Weights(state))
            for entry in plan.entries:
                entry.make(torch.float64)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="`qk_gain` must be one of vector, metric, got 'form'"):
        convert_model(family_model("qwen3"), qk_gain="form")


@over_forms
def test_a_folder_becomes_what_its_model_becomes(form, tmp_path):
    source = family_model("qwen3", torch.float32)
    source.save_pretrained(tmp_path / "source", max_shard_size=20_000)
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "out", qk_gain=form, progress=False)
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    converted, expected = RiGPTForCausalLM.from_pretrained(tmp_path / "out"), convert_model(source, qk_gain=form)
    assert converted.config.qk_norm_gain == form
    for key, tensor in converted.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key


class TestNegativeControls:
    """What a mechanism left out gives."""

    @staticmethod
    def off(change) -> float:
        source = family_model("qwen3")
        converted = convert_model(source, qk_gain="metric")
        assert certify(source, converted, tokens(2, 36)).passed
        with torch.no_grad():
            for layer in converted.model.layers:
                change(layer.self_attn)
        return certify(source, converted, tokens(2, 36)).relative_logit_error

    def test_a_metric_that_is_left_out(self):
        assert self.off(lambda attention: attention.q_norm.weight.copy_(torch.eye(10).repeat(4, 1))) > 0.01

    def test_the_map_of_the_gains_in_place_of_their_inverse(self):
        def invert(attention):
            weight = attention.k_norm.weight
            weight.copy_(torch.linalg.inv(weight.unflatten(0, (-1, weight.shape[1]))).flatten(0, 1))

        assert self.off(invert) > 0.01
