"""What a configuration says is carried over if the class reads it; if not, it is neither believed nor refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rigpt_hf.conversion import certify, convert_model
from rigpt_hf.conversion.families import ARCHITECTURES

from ..models import tokens
from .families import family_model


# Each takes seconds: one that ignores much, and one that computes what others are told.
QUICK = ("ernie4_5", "stablelm")
# Of the library and not of a class: how weights are drawn, what generation does, how long a sequence may be.
LIBRARY = {"initializer_range", "init_std", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
LIBRARY |= {"max_position_embeddings"}
# Of the loss, which `test_experts.py` compares.
LIBRARY |= {"output_router_logits", "router_aux_loss_coef"}
# What some of the classes read, with a value that no model of `FAMILIES` has.
OTHERS: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 44),
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 4),
    "head_dim": 12,
    **dict.fromkeys(("num_experts", "num_local_experts"), 3),
    "num_experts_per_tok": 1,
    "swiglu_limit": 0.3,
    "swiglu_alpha": 2.0,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    "hidden_act": "gelu_pytorch_tanh",
    **dict.fromkeys(("activation_function", "activation"), "silu"),
    "rotary_dim": 2,
    "logit_scale": 0.3,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), 0.1),
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 3.0,
        # What Ministral 3 needs besides.
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.0,
    },
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.4),
    **dict.fromkeys(("hidden_dropout", "dropout", "residual_dropout", "embedding_dropout"), 0.4),
}
SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "enable_bias", "bias", "use_parallel_residual")
SWITCHES += ("new_decoder_architecture", "multi_query", "use_qk_norm", "qk_layernorm", "qkv_bias", "norm_topk_prob")
CASES = [*OTHERS.items(), *((name, value) for name in SWITCHES for value in (True, False))]
# Where it turns one plane, any base is the same; with another size of heads part of it does not fit the rest.
STABLELM = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 0.67},
    "head_dim": 8,
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "stablelm": STABLELM,
    "gpt_neox": STABLELM | {"head_dim": 12},  # of which as many turn as of some of the right size
    "persimmon": STABLELM | {"head_dim": 7},
    "olmoe": {"head_dim": 6},  # no other fits the norms
    "phi": {"hidden_act": "silu"},  # the other value is another name of what it has
}
# The class computes the first, and the second is refused.
IMPOSSIBLE = {("falcon", "head_dim"), ("persimmon", "hidden_dropout")}
# The maps have biases anyway, for those of the norms; a scale is no option of ours.
READ_BY_RULES = {"use_qkv_bias", "logit_scale"}


def behaviour(model) -> tuple[dict, list[torch.Tensor]]:
    """Names and shapes of all tensors, and the logits, in evaluation and where it drops something."""
    logits = []
    for training in (True, False):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(model.train(training)(tokens(2, 12) % 50).logits)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, logits


@pytest.mark.full
def test_a_field_that_is_believed_unread_is_found(monkeypatch):
    entry = ARCHITECTURES["ernie4_5"]

    def believing(config, dropout=None):
        result = entry.rigpt_config(config, dropout)
        result.attention_dropout = getattr(config, "attention_dropout", 0.0)
        return result

    monkeypatch.setitem(ARCHITECTURES, "ernie4_5", replace(entry, rigpt_config=believing))
    with pytest.raises(AssertionError, match="attention_dropout is not read"):
        test_exactly_what_a_class_reads_is_carried_over("ernie4_5")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in ARCHITECTURES]
)
@pytest.mark.by_default(1)
def test_exactly_what_a_class_reads_is_carried_over(name):
    source, entry = family_model(name), ARCHITECTURES[name]
    shapes, logits = behaviour(source)
    config, weights = entry.result(source.config).to_diff_dict(), convert_model(source).state_dict()
    ours = {stock: ours for ours, stock in source.config.attribute_map.items()}
    fields = {*entry.family.fields.values(), *entry.family.options.values()}
    fields = {ours.get(field, field) for field in fields} - LIBRARY
    carried, ignored = set(), set()
    for option, value in CASES:
        if (name, option) in IMPOSSIBLE:
            continue
        value = OTHERWISE.get(name, {}).get(option, value)
        options = {"layer_types": ["full_attention"] * 2} if option == "num_hidden_layers" else {}
        changed = family_model(name, **options, **{option: value})
        believed = entry.result(changed.config).to_diff_dict() != config
        new_shapes, new_logits = behaviour(changed)
        if new_shapes != shapes or not all(map(torch.equal, new_logits, logits)):
            assert believed or option in READ_BY_RULES, f"{option} is read"
            carried.add(option)
        else:
            assert not believed, f"{option} is not read"
            new_weights = convert_model(changed).state_dict()  # which refuses nothing
            assert all(torch.equal(tensor, new_weights[key]) for key, tensor in weights.items())
            ignored.add(option)
    print(f"{name}: {len(carried)} carried, {len(ignored)} ignored")
    assert fields <= carried and len(ignored - carried) > 5


def test_an_option_that_is_off_by_none():
    for name, options in (("ernie4_5", {"use_cache": None, "use_bias": None}), ("llama", {"attention_dropout": None})):
        result = ARCHITECTURES[name].result(family_model(name, **options).config)
        assert (result.use_cache, result.mlp_bias, result.attention_dropout) == (
            "use_cache" not in options,
            name == "llama",
            0.0,
        )


@pytest.mark.parametrize("name", ["llama", "granite", "nanochat"])
def test_a_proportional_rotation_in_part_is_honoured(name):
    rope = {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.4}
    source, whole = family_model(name, rope_parameters=rope), family_model(name)
    ids = tokens(2, 36)
    assert certify(source, convert_model(source), ids).passed
    assert not certify(whole, convert_model(source), ids).passed
