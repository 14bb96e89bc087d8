"""Mixtral, Qwen2-MoE and Qwen3-MoE: Llama's weight map, with a router and experts in the place of the MLP."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ..configuration_rigpt import RiGPTConfig
from .experts import dense_layers, jitter, no_experts
from .llama import (
    ATTENTION_BIASES,
    LLAMA,
    ONE_WINDOW,
    PARTIAL,
    ROTARY,
    UNBIASED,
    WINDOWS,
    kin_config,
    kin_target,
    one_window,
    sight,
    window_by_layer,
)
from .maps import Architecture, Family, Rule, same
from .qwen3 import QWEN3, SHARED_GAINS


_MLP = "model.layers.{i}.mlp"
_NORM = "model.layers.{i}.post_attention_layernorm"
_EXPERTS = tuple(
    Rule(name, name, norm)
    for part, norm in (
        ("gate", _NORM),
        ("experts.gate_proj", _NORM),
        ("experts.up_proj", _NORM),
        ("experts.down_proj", None),
        ("experts.down_bias", None),
        ("shared_expert.gate_proj", _NORM),
        ("shared_expert.up_proj", _NORM),
        ("shared_expert.down_proj", None),
        ("shared_expert_gate", _NORM),
    )
    for name in [f"{_MLP}.{part}"]
)
LOSS = same("output_router_logits", "router_aux_loss_coef")
_OPTIONS = LOSS | same("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")


def with_experts(family: Family, name: str, **changes: Any) -> Family:
    """A family of its own with experts besides the MLPs of another."""
    return replace(family.varied(name, **changes), rules=(*family.rules, *_EXPERTS))


MIXTRAL = with_experts(
    UNBIASED,
    "Mixtral",
    options=LOSS
    | {
        "num_experts": "num_local_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "intermediate_size",
    },
)
QWEN2_MOE = with_experts(LLAMA, "Qwen2-MoE", options=_OPTIONS | same("shared_expert_intermediate_size"))
QWEN3_MOE = with_experts(QWEN3, "Qwen3-MoE", options=ATTENTION_BIASES | _OPTIONS)


def mixtral_config(config: MixtralConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Mixtral; see [`kin_config`]."""
    return kin_config(MIXTRAL, config, norm_topk_prob=True, **sight(config, False))


def qwen2_moe_config(config: Qwen2MoeConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Qwen2-MoE, whose queries, keys and values may have biases, and which has a shared expert."""
    dense = dense_layers(config)
    return kin_config(QWEN2_MOE, config, attention_bias=config.qkv_bias, mlp_only_layers=dense, **sight(config, True))


def qwen3_moe_config(config: Qwen3MoeConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Qwen3-MoE, with gains behind the norms of queries and keys."""
    dense = dense_layers(config)
    norms: dict[str, Any] = {"qk_norm": True, "qk_norm_gain": "vector"}
    return kin_config(QWEN3_MOE, config, mlp_only_layers=dense, **norms, **sight(config, False))


REFUSED = PARTIAL | {"num_experts": no_experts}
ARCHITECTURES = {
    "mixtral": Architecture("MixtralForCausalLM", MIXTRAL, mixtral_config, PARTIAL | {"router_jitter_noise": jitter}),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", QWEN2_MOE, qwen2_moe_config, REFUSED),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", QWEN3_MOE, qwen3_moe_config, REFUSED),
}


def with_dense_layers(
    windows: Callable[[RiGPTConfig], dict[str, Any]],
) -> Callable[[RiGPTConfig], dict[str, Any]]:
    """The fields by which a Qwen's configuration tells layers apart: their windows, and which have no experts."""
    return lambda config: windows(config) | {"mlp_only_layers": list(config.mlp_only_layers or ())}


def qwen2_layers(config: RiGPTConfig) -> dict[str, Any]:
    """The fields of a Qwen2-MoE's configuration for windows and biases."""
    return window_by_layer(config) | {"qkv_bias": config.attention_bias}


def qwen3_layers(config: RiGPTConfig) -> dict[str, Any]:
    """The fields of a Qwen3-MoE's configuration for windows, which all layers have or none."""
    return one_window(config) | {"use_sliding_window": config.sliding_window is not None}


Expressed = dict[str, Callable[[RiGPTConfig], bool] | None]
HAS_EXPERTS: Expressed = {"num_experts": lambda config: config.num_experts is not None}
EVERY_LAYER: Expressed = {"mlp_only_layers": lambda config: not config.mlp_only_layers}
_MIXTRAL: Expressed = EVERY_LAYER | {"norm_topk_prob": lambda config: config.norm_topk_prob}
_QWEN2: Expressed = {
    "attention_bias": None,
    "mlp_only_layers": None,
    "shared_expert_intermediate_size": lambda config: config.shared_expert_intermediate_size is not None,
}
_QWEN3: Expressed = SHARED_GAINS | {"mlp_only_layers": None}
TARGETS = {
    "mixtral": kin_target(
        MixtralForCausalLM,
        MIXTRAL,
        f"{ROTARY}, gated experts whose weights sum to 1, no biases, one window",
        HAS_EXPERTS | _MIXTRAL | ONE_WINDOW,
        windows=one_window,
    ),
    "qwen2_moe": kin_target(
        Qwen2MoeForCausalLM,
        QWEN2_MOE,
        f"{ROTARY}, gated experts and one that all tokens share, and biases on q, k and v alone",
        HAS_EXPERTS | _QWEN2 | WINDOWS,
        windows=with_dense_layers(qwen2_layers),
    ),
    "qwen3_moe": kin_target(
        Qwen3MoeForCausalLM,
        QWEN3_MOE,
        f"{ROTARY}, q/k normalisation, gated experts without biases, one window",
        HAS_EXPERTS | _QWEN3 | ONE_WINDOW,
        windows=with_dense_layers(qwen3_layers),
    ),
}
