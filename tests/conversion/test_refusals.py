"""What has no exact form is refused, by name, with what to do; nothing is dropped silently."""

import pytest
import torch
from transformers import GPT2Model, GPTBigCodeConfig, GPTBigCodeForCausalLM

from rigpt_hf.checkpoints.weights import Weights
from rigpt_hf.conversion import convert_model
from rigpt_hf.conversion.families import ARCHITECTURES, architecture_of
from rigpt_hf.conversion.plan import make_plan

from .sources import gpt2_config, llama_config, mistral_config, qwen2_config, stock_model


def result(config, *dropout):
    return architecture_of(config).result(config, *dropout)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: result(gpt2_config(add_cross_attention=True)), "`add_cross_attention=True`.*without an encoder"),
        (lambda: result(gpt2_config(activation_function="quick_gelu")), "`activation_function`.*'quick_gelu'"),
        (lambda: result(gpt2_config(resid_pdrop=0.1), "refuse"), "`resid_pdrop=0.1`.*dropout='vector'"),
        (lambda: result(gpt2_config(), "token"), "`dropout` must be one of vector, none, refuse, got 'token'"),
        (lambda: result(llama_config(hidden_act="mish")), "`hidden_act` must be one of.*'mish'"),
        (
            lambda: result(llama_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})),
            "partial_rotary_factor",
        ),
        (
            lambda: architecture_of(GPTBigCodeConfig()),
            "'gpt_bigcode'` cannot.*for it. `rigpt families` lists the 39 that can",
        ),
        (lambda: architecture_of(llama_config(quantization_config={"quant_method": "awq"})), "`quantization_config`"),
    ],
)
def test_options_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_windows_stay_however_long_they_are():
    """Rotary positions go on beyond the length that a model is made for."""
    seen = {"use_sliding_window": True, "max_window_layers": 1}
    for config, window in (
        (mistral_config(sliding_window=64), 64),
        (mistral_config(sliding_window=63), 63),
        (qwen2_config(sliding_window=8), None),
        (qwen2_config(sliding_window=8, **seen), 8),
    ):
        assert result(config).sliding_window == window


def test_models_of_other_classes_or_without_weights_are_refused():
    other = GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=30, n_embd=16, n_layer=1, n_head=2))
    with torch.device("meta"):
        empty = type(stock_model("gpt2"))(gpt2_config())
    for model, message in (
        (GPT2Model(gpt2_config()), "`hf_model` must be one of GPT2LMHeadModel.*got GPT2Model"),
        (other, "'gpt_bigcode'` cannot be converted: no weight map has been written for it"),
        (empty, "meta device.*convert_checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_model(model)


def plan(name: str, change):
    source = stock_model(name)
    state_dict = dict(source.state_dict())
    change(state_dict)
    return make_plan(ARCHITECTURES[source.config.model_type], source.config, Weights(state_dict))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("gpt2", lambda d: d.update({"transformer.h.0.adapter": torch.ones(1)}), "`transformer.h.0.adapter`"),
        ("gpt2", lambda d: d.pop("transformer.h.1.ln_2.bias"), "`transformer.h.1.ln_2.bias` is missing"),
        ("gpt2", lambda d: d.pop("transformer.h.1.attn.c_attn.bias"), "`transformer.h.1.attn.c_attn.bias` is missing"),
        ("gpt2", lambda d: d.update({"lm_head.weight": torch.ones(61, 24)}), "`lm_head.weight` differs from"),
        ("llama", lambda d: d.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}), "q_proj.bias"),
        ("llama", lambda d: d.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(6)}), "gains behind"),
        ("llama", lambda d: d.pop("lm_head.weight"), "`lm_head.weight` is missing"),
        ("qwen2", lambda d: d.pop("model.layers.0.self_attn.k_proj.bias"), "k_proj.bias` is missing"),
    ],
)
def test_unknown_and_missing_keys_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        plan(name, change)


def test_shapes_that_contradict_the_configuration_are_named():
    made = plan("gpt2", lambda d: d.update({"transformer.wpe.weight": torch.ones(7, 24)}))
    entry = next(entry for entry in made.entries if entry.name == "model.embed_positions.weight")
    with pytest.raises(ValueError, match=r"`model.embed_positions.weight` must have shape \[40, 24\].*\[7, 24\]"):
        entry.make(torch.float32)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "transformer."])
def test_a_prefix_that_is_not_known_is_named(prefix):
    def put_in_front(state_dict):
        renamed = {prefix + name: tensor for name, tensor in state_dict.items()}
        state_dict.clear()
        state_dict.update(renamed)

    with pytest.raises(
        ValueError, match=f"missing from the source, whose keys begin with '{prefix}'.* Save that part"
    ):
        plan("gpt2", put_in_front)


def test_masks_of_older_releases_are_harmless():
    def add_masks(state_dict):
        state_dict["transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
        state_dict["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    assert len(plan("gpt2", add_masks).entries) == len(plan("gpt2", lambda d: None).entries)
