"""OLMo 2 and 3: norms behind blocks and none in front, and of all heads of queries, or of keys, together."""

from typing import Any

from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo3Config, Olmo3ForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .gemma import OUTPUT_NORMS, with_output_norms
from .llama import (
    ATTENTION_BIASES,
    BY_TYPE,
    LLAMA,
    PARTIAL,
    ROTARY,
    WINDOWS,
    Expressed,
    by_type,
    kin_config,
    kin_target,
    layers_in_sight,
    sight,
)
from .maps import Architecture
from .qwen3 import with_head_gains


_BARE = {reader: {"norm": None} for reader in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
OLMO2 = with_output_norms(
    with_head_gains(LLAMA.varied("OLMo 2", _BARE, options=ATTENTION_BIASES)),
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
OLMO3 = OLMO2.varied("OLMo 3")
_NORMS: dict[str, Any] = {"pre_norm": False, "post_norm": True}
_NORMS |= {"qk_norm": True, "qk_norm_over": "all", "qk_norm_gain": "vector"}


def rigpt_config(config: Olmo2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to an OLMo 2; see [`kin_config`]."""
    return kin_config(OLMO2, config, **_NORMS)


def olmo3_config(config: Olmo3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for an OLMo 3, some of whose layers slide and turn otherwise."""
    return kin_config(OLMO3, config, **_NORMS, **sight(config, True))


ARCHITECTURES = {
    "olmo2": Architecture("Olmo2ForCausalLM", OLMO2, rigpt_config, PARTIAL),
    "olmo3": Architecture("Olmo3ForCausalLM", OLMO3, olmo3_config, PARTIAL),
}
_EXPRESSED: Expressed = OUTPUT_NORMS | {
    "pre_norm": lambda config: not config.pre_norm,
    "qk_norm": lambda config: config.qk_norm,
    "qk_norm_over": lambda config: config.qk_norm_over == "all",
    "qk_norm_gain": None,
}
_SUMMARY = f"{ROTARY}, norms behind blocks and none in front, queries and keys normalised over all heads, a gated MLP"
TARGETS = {
    "olmo2": kin_target(Olmo2ForCausalLM, OLMO2, _SUMMARY, _EXPRESSED),
    "olmo3": kin_target(
        Olmo3ForCausalLM,
        OLMO3,
        _SUMMARY,
        _EXPRESSED | WINDOWS | BY_TYPE,
        windows=layers_in_sight,
        rope_parameters=by_type,
    ),
}
