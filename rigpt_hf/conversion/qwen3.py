"""Qwen3: Llama's weight map, and norms of queries and keys with a gain for each dimension of a head."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import (
    ATTENTION_BIASES,
    LLAMA,
    PARTIAL,
    ROTARY,
    WINDOWS,
    kin_config,
    kin_target,
    sight,
    window_by_layer,
)
from .maps import Architecture, Family, Rule


def with_head_gains(family: Family, source: str = "model.layers.{i}.self_attn.{of}_norm", **own: Any) -> Family:
    """
    A family whose queries and keys have norms with gains.

    Args:
        family (`Family`): without them.
        source (`str`): the stock norm, where `{of}` stands for q or k.
        own: of the rules of these norms.
    """
    norms = {of: f"model.layers.{{i}}.self_attn.{of}_norm" for of in "qk"}
    normed = family.varied(family.name, {f"{of}_proj": {"behind": norm} for of, norm in norms.items()})
    added = (Rule(norm, source.replace("{of}", of), gain=True, **own) for of, norm in norms.items())
    return replace(normed, rules=(*normed.rules, *added))


# For `expresses` of a class whose heads share their gains.
SHARED_GAINS: dict[str, Callable[[RiGPTConfig], bool] | None] = {
    "qk_norm": lambda config: config.qk_norm,
    "qk_norm_gain": lambda config: config.qk_norm_gain != "vector_per_head",
}
# And of one that has norms of heads if an option says so, with gains of each, or with such as all share.
OWN_IF_ANY: dict[str, Callable[[RiGPTConfig], bool] | None] = {"qk_norm_gain": None}
SHARED_IF_ANY = {"qk_norm_gain": SHARED_GAINS["qk_norm_gain"]}

QWEN3 = with_head_gains(LLAMA.varied("Qwen3", options=ATTENTION_BIASES))


def rigpt_config(config: Qwen3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Qwen3; see [`kin_config`]."""
    return kin_config(QWEN3, config, qk_norm=True, qk_norm_gain="vector", **sight(config, True))


ARCHITECTURES = {"qwen3": Architecture("Qwen3ForCausalLM", QWEN3, rigpt_config, PARTIAL)}
TARGETS = {
    "qwen3": kin_target(
        Qwen3ForCausalLM,
        QWEN3,
        f"{ROTARY}, q/k normalisation, and a gated MLP without biases",
        SHARED_GAINS | WINDOWS,
        windows=window_by_layer,
    )
}
