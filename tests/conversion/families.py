"""Tiny stock models of every architecture that converts, with odd options; what a family adds here, all tests use."""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import convert_model
from rigpt_hf.layers_rigpt import FULL, SLIDING

from ..models import randomise_
from .sources import SIZES, TOKENS


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.7,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.3,
    "rms_norm_eps": 1e-3,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.1, 1.7, 2.9],
    "long_factor": [2.0, 3.0, 4.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
OPT = {"ffn_dim": 40, "dropout": 0.0}
GPT_NEO = {"resid_dropout": 0.0, "embed_dropout": 0.0, "layer_norm_epsilon": 1e-3}
# Rope parameters of layers that slide and of those that do not.
BY_TYPE = {
    FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    SLIDING: {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA2 = {"sliding_window": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "rms_norm_eps": 1e-3}
MOE = {"num_experts_per_tok": 2, "rms_norm_eps": 1e-3}
QWEN_MOE = MOE | {"num_experts": 5, "moe_intermediate_size": 16}
OLMOE = MOE | {"num_experts": 5, "intermediate_size": 16}
GPT_OSS = MOE | {"num_local_experts": 5, "intermediate_size": 16, "sliding_window": 8, "swiglu_limit": 0.5}
GPT_OSS |= {"head_dim": 10, "num_attention_heads": 6}
FALCON = {"ffn_hidden_size": 40}
NANOCHAT = {"final_logit_softcapping": None}
# The name of the architecture, and after a dash that of the variant: options of the configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 50, "layer_norm_epsilon": 1e-3, "scale_attn_by_inverse_layer_idx": True},
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "mistral": {"head_dim": 10, "sliding_window": None},
    "ministral": {"sliding_window": 8, "layer_types": ["full_attention"] * 3, "head_dim": 10},
    "ministral-window": TIED | {"sliding_window": 8, "layer_types": [FULL, SLIDING, FULL], "head_dim": 6},
    "ministral3": {"head_dim": 10, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "ministral3-unscaled": TIED
    | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.0, "factor": 2.0}, "head_dim": 6},
    "mistral-window": TIED | {"head_dim": 6, "sliding_window": 8},
    "qwen2": TIED,
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gpt_neo": GPT_NEO | {"attention_types": [[["global", "local", "local"], 1]], "window_size": 8},
    "gpt_neo-untied": GPT_NEO | UNTIED | {"attention_types": [[["local"], 3]], "window_size": 64},
    "smollm3": UNTIED | {"no_rope_layers": [1, 0, 1], "attention_bias": True},
    "smollm3-window": TIED
    | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8, "mlp_bias": True},
    "qwen3": {"head_dim": 10, "attention_bias": True},
    "qwen3-window": TIED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "head_dim": 6},
    "qwen3-tied": TIED | {"head_dim": 6, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "arcee": {"head_dim": 10},
    "arcee-tied": TIED | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "granite": GRANITE | {"attention_bias": True},
    "granite-tied": GRANITE | TIED | {"mlp_bias": True, "num_key_value_heads": 4},
    "gemma": {"head_dim": 10},
    "gemma2": GEMMA2 | {"head_dim": 10, "layer_types": [SLIDING, FULL, SLIDING], "query_pre_attn_scalar": 7},
    "gemma2-untied": UNTIED
    | {
        "head_dim": 6,
        "attention_bias": True,
        "layer_types": [FULL] * 3,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma-untied": UNTIED | {"head_dim": 6, "attention_bias": True, "rms_norm_eps": 1e-3},
    "ernie4_5": {"head_dim": 10},
    "ernie4_5-untied": UNTIED | {"head_dim": 6, "use_bias": True, "num_key_value_heads": 1},
    "olmo": {},
    "olmo-tied": TIED | {"attention_bias": True, "num_key_value_heads": 4},
    "stablelm": {"partial_rotary_factor": 0.34},
    "stablelm-tied": TIED | {"use_qkv_bias": True, "partial_rotary_factor": 0.67, "layer_norm_eps": 1e-3},
    "phi3": {"partial_rotary_factor": 0.67, "num_key_value_heads": 1},
    "phi3-tied": TIED | {"num_key_value_heads": 4, "sliding_window": 8},
    "opt": OPT,
    "opt-untied": OPT | UNTIED | {"enable_bias": False, "activation_function": "gelu_new"},
    "opt-no-gains": OPT | {"layer_norm_elementwise_affine": False},
    "opt-nothing": OPT | {"layer_norm_elementwise_affine": False, "enable_bias": False},
    "opt-narrow": OPT | {"word_embed_proj_dim": 16},
    "opt-wide": OPT | UNTIED | {"word_embed_proj_dim": 32, "layer_norm_elementwise_affine": False},
    "starcoder2": {"head_dim": 10, "rope_parameters": YARN},
    "starcoder2-untied": UNTIED | {"use_bias": False, "norm_epsilon": 1e-3, "sliding_window": 8, "hidden_act": "relu"},
    "nanochat": NANOCHAT | {"head_dim": 10, "num_key_value_heads": 1},
    "nanochat-tied": TIED
    | {"final_logit_softcapping": 0.5}
    | {"attention_bias": True, "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.34}},
    "gpt_neox-serial": TIED | {"use_parallel_residual": False, "layer_norm_eps": 1e-3, "rotary_pct": 0.67},
    "gpt_neox-unbiased": {"attention_bias": False, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
    "gptj": {"rotary_dim": 4, "n_inner": 50},
    "gptj-tied": TIED | {"rotary_dim": 6, "layer_norm_epsilon": 1e-3, "activation_function": "relu"},
    "phi": {"partial_rotary_factor": 0.67, "head_dim": 6},
    "phi-tied": TIED | {"num_key_value_heads": 1, "head_dim": 10, "partial_rotary_factor": 0.4},
    "falcon": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-one-norm": FALCON
    | UNTIED
    | {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1, "bias": True},
    "falcon-multi-query": FALCON | {"layer_norm_epsilon": 1e-3},
    "falcon-serial": FALCON | {"parallel_attn": False, "multi_query": False, "bias": True},
    "falcon-heads": FALCON | UNTIED | {"multi_query": False, "activation": "relu"},
    "cohere": {"head_dim": 10},
    "cohere-untied": UNTIED | {"head_dim": 6, "attention_bias": True, "logit_scale": 0.7, "layer_norm_eps": 1e-3},
    "cohere2": {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]},
    "cohere2-untied": UNTIED
    | {"layer_types": [FULL] * 3, "attention_bias": True, "logit_scale": 0.7, "layer_norm_eps": 1e-3},
    "cohere2-turned": {"sliding_window": 64, "layer_types": [SLIDING] * 3, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3_text": {
        "head_dim": 10,
        "layer_types": [SLIDING, FULL, SLIDING],
        "sliding_window": 8,
        "rope_parameters": BY_TYPE,
        "query_pre_attn_scalar": 7,
        "final_logit_softcapping": 2.0,
        "rms_norm_eps": 1e-3,
    },
    # The class does not read the first of these.
    "gemma3_text-unbounded": UNTIED
    | {"attn_logit_softcapping": 0.5, "head_dim": 6, "attention_bias": True, "rope_parameters": BY_TYPE}
    | {"layer_types": [FULL] * 3, "num_key_value_heads": 1},
    "gemma3_text-far": {
        "head_dim": 6,
        "layer_types": [SLIDING, FULL, SLIDING],
        "sliding_window": 64,
        "rope_parameters": BY_TYPE | {FULL: YARN},
    },
    "olmo2": {"rms_norm_eps": 1e-3},
    "olmo2-tied": TIED | {"attention_bias": True, "num_key_value_heads": 4, "hidden_act": "relu"},
    "olmo3": {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": BY_TYPE | {FULL: YARN}},
    "olmo3-tied": TIED
    | {"sliding_window": 8, "layer_types": [SLIDING] * 3, "rope_parameters": BY_TYPE, "num_key_value_heads": 1},
    "glm": {"head_dim": 10, "partial_rotary_factor": 0.6},
    "glm-tied": TIED | {"head_dim": 6, "attention_bias": False, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-3},
    "glm4": {"head_dim": 10, "partial_rotary_factor": 0.4, "num_key_value_heads": 1},
    "glm4-tied": TIED | {"head_dim": 12, "attention_bias": False, "rms_norm_eps": 1e-3},
    "mixtral": MOE | {"num_local_experts": 5, "head_dim": 10},
    "mixtral-window": MOE | TIED | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 8},
    "qwen2_moe": QWEN_MOE | {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 2},
    "qwen2_moe-tied": QWEN_MOE
    | TIED
    | {"shared_expert_intermediate_size": 28, "norm_topk_prob": True, "qkv_bias": False},
    "qwen3_moe": QWEN_MOE | {"norm_topk_prob": True, "head_dim": 10, "mlp_only_layers": [1]},
    "qwen3_moe-tied": QWEN_MOE | TIED | {"attention_bias": True, "num_experts_per_tok": 1, "head_dim": 6},
    "olmoe": OLMOE,
    "olmoe-tied": OLMOE | TIED | {"attention_bias": True, "norm_topk_prob": True, "num_key_value_heads": 4},
    "gpt_oss": GPT_OSS | {"rope_parameters": YARN | {"truncate": False}},
    "gpt_oss-tied": GPT_OSS
    | TIED
    | {"layer_types": [FULL] * 3, "attention_bias": False, "swiglu_alpha": 1.0, "num_key_value_heads": 1},
    "stablelm-parallel": {"use_parallel_residual": True, "partial_rotary_factor": 0.34, "num_key_value_heads": 1},
    "stablelm-heads": {"qk_layernorm": True, "partial_rotary_factor": 0.67, "num_key_value_heads": 1},
    "phi-heads": {"qk_layernorm": True, "partial_rotary_factor": 0.67, "num_key_value_heads": 2},
    "persimmon": {"partial_rotary_factor": 0.67, "layer_norm_eps": 1e-3},
    "persimmon-bare": TIED | {"qk_layernorm": False, "hidden_act": "gelu_new", "partial_rotary_factor": 0.34},
    "cohere-heads": {"use_qk_norm": True, "head_dim": 10, "attention_bias": True, "layer_norm_eps": 1e-3},
    "gpt_neox-rotation": {"head_dim": 12, "rope_parameters": YARN | {"partial_rotary_factor": 0.4}},
    "mpt": {"n_heads": 6, "attn_config": {"softmax_scale": 0.7}},
    "mpt-untied": UNTIED | {"layer_norm_epsilon": 1e-3},
    "bloom": {},
    "bloom-untied": UNTIED | {"n_head": 6, "layer_norm_epsilon": 1e-3},
    "phi3-longrope": {"rope_parameters": LONGROPE | {"factor": 8.0}, "original_max_position_embeddings": 64},
}


def architecture(name: str) -> str:
    """The architecture of a source: its name as far as the dash."""
    return name.partition("-")[0]


def family_config(name: str, **options: Any) -> PreTrainedConfig:
    """The configuration of a stock model; it shares nothing with the options, into which the library writes."""
    sizes = SIZES | TOKENS | {"pad_token_id": None}
    return CONFIG_MAPPING[architecture(name)](**deepcopy(sizes | FAMILIES[name] | options))


def family_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> PreTrainedModel:
    """
    A stock model in evaluation mode, all of its weights random, gains far from 1 and biases far from 0.

    It is made in its dtype, as the library loads one: constants that it keeps in buffers are rounded to that.
    """
    config = family_config(name, **options)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += (0.4 * torch.randn(parameter.shape, dtype=torch.float64)).to(dtype)
    return with_plain_experts(randomise_(model, seed).eval())


def with_plain_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The model; of the library's ways to compute experts it takes the one that knows float64."""
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")
    return model


@cache
def converted_family(name: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, RiGPTForCausalLM]:
    """A stock model and what it becomes; made once, so neither may be changed."""
    source = family_model(name, dtype)
    return source, convert_model(source)
