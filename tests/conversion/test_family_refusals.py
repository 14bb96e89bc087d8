"""Options of families that have no exact form: refused by name, with the next step; and windows that classes use."""

import pytest
import torch

from rigpt_hf.conversion import certify, convert_model
from rigpt_hf.conversion.families import ARCHITECTURES
from rigpt_hf.layers_rigpt import FULL, SLIDING

from ..models import tokens
from .families import BY_TYPE, FAMILIES, YARN, architecture, family_config, family_model


def test_every_refusal_has_a_case():
    cases = [(ARCHITECTURES[architecture(name)], family_model(name, **options).config) for name, options, _ in REFUSED]
    said = {option for entry, config in cases for option, words in entry.refused.items() if words(config)}
    assert said == {option for entry in ARCHITECTURES.values() for option in entry.refused}


SLIDING_FAMILIES = {architecture(name): name for name in FAMILIES if hasattr(family_config(name), "sliding_window")}


@pytest.mark.parametrize("kind", ["full_attention", pytest.param("sliding_attention", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SLIDING_FAMILIES)
@pytest.mark.by_default(6)
def test_layers_slide_if_the_class_looks_through_a_window(name, kind):
    """Whether `layer_types` decides is a property of the class."""
    options = FAMILIES[name] | {"layer_types": [kind] * 3, "use_sliding_window": True, "sliding_window": 8}
    source, ids = family_model(name, **options), tokens(2, 36)
    free = family_model(name, **(options | {"sliding_window": 64}))
    slides = not torch.equal(source(ids).logits, free(ids).logits)
    for model, window in ((source, 8 if slides else None), (free, 64 if slides else None)):
        converted = convert_model(model)
        assert converted.config.sliding_window == window and certify(model, converted, ids).passed


LONG = {"max_position_embeddings": 128}
REFUSED: list[tuple[str, dict, str]] = [
    ("mixtral", {"router_jitter_noise": 0.1}, "`router_jitter_noise=0.1` cannot be converted"),
    ("qwen3_moe", {"num_experts": 0}, "`num_experts` must be at least 1 to be converted"),
    ("gpt2", {"add_cross_attention": True}, "`add_cross_attention=True` cannot be converted.*without an encoder"),
    ("ministral3", LONG, r"`rope_parameters\['llama_4_scaling_beta'\]=0.1` scales.* from position 64 on.*set"),
    ("gemma", {"use_bidirectional_attention": True}, "`use_bidirectional_attention=True` cannot be converted"),
    ("gemma", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("gemma", {"hidden_act": "mish"}, "`hidden_act` must be one of.*'mish'"),
    ("olmo", {"clip_qkv": 8.0}, "`clip_qkv=8.0` cannot be converted: it cuts off single coordinates"),
    ("olmoe", {"clip_qkv": 8.0}, "`clip_qkv=8.0` cannot be converted: it cuts off single coordinates"),
    ("gpt_neox", {"hidden_act": "mish"}, "`hidden_act` must be one of.*'mish'"),
    (
        "gpt_neox",
        {"head_dim": 10},
        "`head_dim=10` cannot be converted.* = 6, of which 3 dimensions cannot.* Remove it",
    ),
    ("stablelm", {"head_dim": 9}, "`head_dim=9` cannot be converted.* = 6, of which 3 dimensions cannot"),
    ("persimmon", {"head_dim": 5}, "`head_dim=5` cannot be converted.* = 6, of which 3 dimensions cannot"),
    ("gpt_neox-rotation", {"head_dim": 20}, "`head_dim=20` cannot be converted.* = 6, of which 8 dimensions cannot"),
    ("gptj", {"rotary_dim": 3}, "`rotary_dim=3` cannot be converted.* a head of 6 "),
    ("gptj", {"rotary_dim": 8}, "`rotary_dim=8` cannot be converted.* a head of 6 "),
    (
        "persimmon",
        {"hidden_dropout": 0.1},
        "`hidden_dropout=0.1` cannot be converted: it drops what the MLP.*Set it to",
    ),
    ("falcon-serial", {"alibi": True}, "`alibi=True` cannot be converted.*to bfloat16.* with rotary positions"),
    ("falcon-serial", {"attention_dropout": 0.1}, "`attention_dropout=0.1` cannot.*`hidden_dropout=0.0`.*training"),
    ("falcon", {"parallel_attn": False}, "`parallel_attn=False` with `new_decoder_architecture=True` cannot"),
    ("falcon-heads", {"num_ln_in_parallel_attn": 2}, "`num_ln_in_parallel_attn=2` with `new_decoder_arch.*=False`"),
    ("falcon", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("cohere2", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("cohere", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("opt", {"do_layer_norm_before": False}, "`do_layer_norm_before=False` cannot.*residual path itself.*350m"),
    ("opt", {"_remove_final_layer_norm": True}, "`_remove_final_layer_norm=True` cannot.*a stream without a norm"),
    ("opt", {"layerdrop": 0.1}, "`layerdrop=0.1` cannot be converted.*Set it to 0.0"),
    ("opt", {"activation_function": "quick_gelu"}, "`activation_function` must be one of.*'quick_gelu'"),
    *(
        (
            "mpt",
            {"attn_config": {option: value}},
            f"`attn_config.{option}={value}` cannot be.* as if it were {honoured}",
        )
        for option, value, honoured in (
            ("qk_ln", True, False),
            ("prefix_lm", True, False),
            ("attn_uses_sequence_id", True, False),
            ("alibi", False, True),
            ("alibi_bias_max", 4, 8),
        )
    ),
    ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "`attn_config.clip_qkv=6.0` cannot.*cuts off single coordinates"),
    ("mpt", {"logit_scale": 0.5}, "`logit_scale=0.5` cannot be converted: .* as if it were None"),
    ("mpt", {"no_bias": False}, "`no_bias=False` cannot be converted: .* as if it were True"),
    ("mpt", {"expansion_ratio": 2}, "`expansion_ratio=2` cannot be converted: .* as if it were 4"),
    (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        "`apply_residual_connection_post_layernorm=True` cannot.*residual path itself",
    ),
    ("gemma3_text", {"use_bidirectional_attention": True}, "`use_bidirectional_attention=True` cannot be converted"),
    (
        "gemma3_text",
        {"rope_parameters": BY_TYPE | {FULL: BY_TYPE[SLIDING] | {"partial_rotary_factor": 0.5}}},
        r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional_attention=True` cannot be converted"),
    ("gemma2", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    (
        "nanochat",
        {"rope_parameters": YARN},
        r"'yarn'` makes.* 1.139 times as long.*`rope_parameters\['attention_fa",
    ),
    ("phi3-longrope", LONG, r"'longrope'.* beyond position 64.* `rope_parameters\['factor'\]` to 8"),
]


@pytest.mark.parametrize("name, options, message", REFUSED)
def test_what_a_family_cannot_express_is_named(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert_model(family_model(name, **options))
    assert "\n" not in str(caught.value)


def test_the_advice_on_long_rotations_is_the_same_function():
    """With the factor that follows from the lengths written down, and the lengths then shortened."""
    options = {"rope_parameters": FAMILIES["phi3-longrope"]["rope_parameters"] | {"factor": None}}
    long = family_model("phi3-longrope", **options, **LONG)
    with pytest.raises(ValueError, match=r"`max_position_embeddings` to 64 and `rope_parameters\['factor'\]` to 2 in"):
        convert_model(long)
    long.config.max_position_embeddings, long.config.rope_parameters["factor"] = 64, 2.0
    assert certify(long, convert_model(long), tokens(2, 36)).passed
    long.config.rope_parameters["factor"] = None  # the scaling of the rotation would follow the shorter length
    assert not certify(long, convert_model(long), tokens(2, 36)).passed
