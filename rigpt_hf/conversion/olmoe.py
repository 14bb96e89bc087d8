"""OLMoE: experts, and norms of all heads of queries, or of keys, together."""

from typing import Any

from transformers import OlmoeConfig, OlmoeForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import ATTENTION_BIASES, LLAMA, PARTIAL, ROTARY, kin_config, kin_target
from .maps import Architecture, same
from .moe import EVERY_LAYER, HAS_EXPERTS, LOSS, REFUSED, with_experts
from .olmo import CLIPPED
from .qwen3 import with_head_gains


_OPTIONS = same("num_experts", "num_experts_per_tok", "norm_topk_prob") | {
    "moe_intermediate_size": "intermediate_size"
}
OLMOE = with_experts(with_head_gains(LLAMA), "OLMoE", options=ATTENTION_BIASES | LOSS | _OPTIONS)


def rigpt_config(config: OlmoeConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to an OLMoE; see [`kin_config`]."""
    norms: dict[str, Any] = {"qk_norm": True, "qk_norm_over": "all", "qk_norm_gain": "vector"}
    return kin_config(OLMOE, config, **norms)


ARCHITECTURES = {"olmoe": Architecture("OlmoeForCausalLM", OLMOE, rigpt_config, PARTIAL | CLIPPED | REFUSED)}
TARGETS = {
    "olmoe": kin_target(
        OlmoeForCausalLM,
        OLMOE,
        f"{ROTARY}, q/k normalisation over all heads, whose sizes add up to that of the stream, and gated experts "
        "without biases",
        HAS_EXPERTS
        | EVERY_LAYER
        | {
            # The class makes its norms as large as the stream.
            "head_dim": lambda config: config.head_dim * config.num_attention_heads == config.hidden_size,
            "qk_norm": lambda config: config.qk_norm,
            "qk_norm_over": lambda config: config.qk_norm_over == "all",
            "qk_norm_gain": None,
        },
    )
}
