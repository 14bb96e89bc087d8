"""The config: defaults, round trips, and every refusal with its text."""

import copy

import pytest
from transformers import AutoConfig

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, RiGPTModel
from tests.models import ALL, over, tiny_config, tokens


WRONG = {
    "score": ({"attention_score": "cosine"}, "`attention_score` must be one of dot, squared_distance, distance, got"),
    "position": (
        {"position_embedding_type": "sinusoidal"},
        "`position_embedding_type` must be one of learned, rotary, alibi, got 'sinusoidal'",
    ),
    "activation": ({"hidden_act": "tanh"}, "`hidden_act` must be one of gelu, .* got 'tanh'"),
    "heads": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "`num_attention_heads` must be a multiple of `num_key_value_heads`, got 4 and 3",
    ),
    "zero": ({"intermediate_size": 0}, "`intermediate_size` must be at least 1, got 0"),
    "no-heads": ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
    "lexical": ({"embedding_size": 0}, "`embedding_size` must be at least 1, got 0"),
    "output-bias": ({"output_bias": True}, "`output_bias` is the bias of `project_out` and needs `embedding_size`"),
    "rope-without-rotation": (
        {"position_embedding_type": "learned", "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
        "`rope_parameters` has a meaning only with `position_embedding_type='rotary'`",
    ),
    "frequencies-without-rotation": (
        {"position_embedding_type": "learned", "rotary_learned_frequencies": True},
        "`rotary_learned_frequencies` needs `position_embedding_type='rotary'`, got 'learned'",
    ),
    "period": ({"value_embedding_period": 0}, "`value_embedding_period` must be at least 1, got 0"),
    "one-layer": (
        {"value_embedding_period": 1, "num_hidden_layers": 1},
        "`value_embedding_period` needs `num_hidden_layers` of at least 2, .* got 1",
    ),
    "solver": ({"depth_solver": "leapfrog"}, "`depth_solver` must be one of euler, .* got 'leapfrog'"),
    "steps": ({"depth_solver": "rk4", "depth_steps": 0}, "`depth_steps` must be at least 1, got 0"),
    "chosen-steps": (
        {"depth_solver": "dopri5", "depth_steps": 2},
        "`depth_steps` must be 1 for `depth_solver='dopri5'`, which chooses its steps, got 2",
    ),
    "interpolation": ({"depth_interpolation": "cubic"}, "`depth_interpolation` must be one of constant, linear, got"),
    "tolerance": ({"depth_rtol": 0.0}, "`depth_rtol` must be positive and finite, got 0.0"),
    "interpolated-layers": ({"depth_interpolation": "linear"}, "`depth_interpolation` needs a `depth_solver`, got"),
    "adjoint-layers": ({"depth_adjoint": True}, "`depth_adjoint` needs a `depth_solver`, got True without"),
    "step-layers": ({"depth_steps": 2}, "`depth_steps` needs a `depth_solver`, got 2 without"),
    "odd-head": ({"head_dim": 7}, "`head_dim` times `partial_rotary_factor` must be even .* got 7"),
}


for dropout, value in (("attention_dropout", -0.1), ("residual_dropout", 1.0), ("embedding_dropout", 1.5)):
    WRONG[dropout] = ({dropout: value}, rf"`{dropout}` is a probability in \[0, 1\), got {value}")


def rope(rope_type, **parameters):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **parameters}}


LONG = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "factor": 2.0}
NUMBERS = "`rope_parameters` must hold all numbers that `rope_type='{}'` needs, got"
WRONG |= {
    f"{name} {value}": ({name: value}, f"`{name}` must be at least 0 and finite, got {value}")
    for name in ("initializer_range", "rms_norm_eps")
    for value in (float("nan"), float("inf"), -0.5)
}
WRONG |= {
    "no-layers": ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 0, got -1"),
    "absurd-layers": ({"num_hidden_layers": 10**9}, r"`num_hidden_layers` must be at most 10000, got 1e\+09"),
    "absurd-tokens": ({"vocab_size": 10**30}, r"`vocab_size` must be at most 2147483647, got 1e\+30"),
    "no-stream": ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
    "no-dropout": ({"attention_dropout": float("nan")}, "`attention_dropout` is a probability"),
    "endless-tolerance": ({"depth_atol": float("inf")}, "`depth_atol` must be positive and finite, got inf"),
    "long-activation": ({"hidden_act": "x" * 999}, r"`hidden_act` must be one of .{,90} got 'x{77}\.\.\.'\."),
    "rope-type": (rope(7), r"`rope_parameters\['rope_type'\]` must be one of default, .* got 7"),
    "rope-list": (rope([]), r"`rope_parameters\['rope_type'\]` must be one of default, .* got \[\]"),
    "whole-rotation": (rope("default", partial_rotary_factor=2.0), "and at most `head_dim`, got 16"),
    "word-rotation": (
        rope("default", partial_rotary_factor="x"),
        "'partial_rotary_factor'.* a number above 0, got 'x'",
    ),
    "lost-factor": (rope("linear"), NUMBERS.format("linear") + ".*factor"),
    "word-factor": (rope("linear", factor="two"), NUMBERS.format("linear")),
    "no-factor": (rope("linear", factor=0.0), NUMBERS.format("linear")),
    "no-frequencies": (rope("llama3", factor=2.0), NUMBERS.format("llama3")),
    "no-theta": (rope("default") | {"rope_parameters": {"rope_theta": 0.0}}, NUMBERS.format("default")),
    "odd-theta": (rope("default") | {"rope_parameters": {"rope_theta": -1.0}}, NUMBERS.format("default")),
    "short-list": (rope("longrope", **LONG | {"short_factor": [1.0]}), NUMBERS.format("longrope")),
    "long-list": (rope("longrope", **LONG | {"long_factor": [1.0] * 5}), NUMBERS.format("longrope")),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def without_origin(config):
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}


@over()
def test_a_config_comes_back_as_it_was_saved(option, tmp_path):
    config = tiny_config(**ALL[option])
    config.save_pretrained(tmp_path)
    for loaded in (RiGPTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RiGPTConfig
        assert without_origin(loaded) == without_origin(config)
    assert RiGPTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_defaults_that_follow_from_other_fields():
    config = RiGPTConfig(hidden_size=32, num_attention_heads=4)
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (128, 4, 8)
    assert config.lexical_size == 32 and RiGPTConfig(embedding_size=24).lexical_size == 24
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert RiGPTConfig(position_embedding_type="learned").rope_parameters is None
    assert RiGPTConfig(hidden_act="gelu_new").hidden_act == "gelu_pytorch_tanh"
    RiGPTConfig()


def test_what_the_test_suites_of_the_library_pass():
    config = RiGPTConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=37,
        hidden_act="gelu",
        head_dim=None,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=512,
        type_vocab_size=16,
        is_decoder=False,
        initializer_range=0.02,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    assert config.num_labels == 3 and config._attn_implementation == "eager"
    assert RiGPTForCausalLM(config)(tokens(2, 7)).logits.shape == (2, 7, 99)
    fewer = config.to_diff_dict()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings"):
        fewer.pop(name, None)
    assert RiGPTModel(RiGPTConfig(**fewer))(tokens(2, 7)).last_hidden_state.shape == (2, 7, 32)


def test_extreme_options_are_possible():
    tiny_config(**rope("longrope", **LONG))
    tiny_config(**rope("yarn", factor=2.0))
    assert RiGPTModel(tiny_config(num_hidden_layers=0))(tokens(2, 7)).last_hidden_state.isfinite().all()
    tiny_config(initializer_range=0.0, rms_norm_eps=0.0)
