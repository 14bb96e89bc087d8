"""gpt-oss: sinks beside the keys, and experts whose maps have biases and whose neurons have bounds."""

from dataclasses import replace
from typing import Any

from transformers import GptOssConfig, GptOssForCausalLM

from ..configuration_rigpt import RiGPTConfig
from ..layers_rigpt import FULL
from .experts import Layout
from .llama import ATTENTION_BIASES, LLAMA, PARTIAL, ROTARY, WINDOWS, kin_config, kin_target, sight
from .maps import Architecture, Rule, same
from .moe import EVERY_LAYER, HAS_EXPERTS, MIXTRAL, with_experts


_SINKS = "model.layers.{i}.self_attn.sinks"
_OPTIONS = {**ATTENTION_BIASES, **MIXTRAL.options, **same("swiglu_limit", "swiglu_alpha")}
_MOE = with_experts(LLAMA, "gpt-oss", options=_OPTIONS).varied(
    "gpt-oss", {"gate": {"source": "model.layers.{i}.mlp.router"}}
)
GPT_OSS = replace(_MOE, rules=(*_MOE.rules, Rule(_SINKS, _SINKS)), experts=Layout(transposed=True, alternating=True))
# The class has no other, whatever its configuration says.
ACTIVATION = "silu"


def rigpt_config(config: GptOssConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a gpt-oss; see [`kin_config`].

    The weights of experts are a softmax over the logits of the chosen: the probabilities among all, divided by their
    sum.
    """
    own: dict[str, Any] = {"attention_sinks": True, "mlp_bias": True, "norm_topk_prob": True, "hidden_act": ACTIVATION}
    return kin_config(GPT_OSS, config, **own, **sight(config, True))


def windows(config: RiGPTConfig) -> dict[str, Any]:
    """The fields for windows; the class wants one even where no layer slides."""
    fields = {"layer_types": config.layer_types or [FULL] * config.num_hidden_layers}
    return fields if config.sliding_window is None else fields | {"sliding_window": config.sliding_window}


ARCHITECTURES = {"gpt_oss": Architecture("GptOssForCausalLM", GPT_OSS, rigpt_config, PARTIAL)}
TARGETS = {
    "gpt_oss": kin_target(
        GptOssForCausalLM,
        GPT_OSS,
        f"{ROTARY}, attention sinks, and gated experts with bounds whose weights sum to 1",
        HAS_EXPERTS
        | EVERY_LAYER
        | WINDOWS
        | {
            "attention_sinks": lambda config: config.attention_sinks,
            "hidden_act": lambda config: config.hidden_act == ACTIVATION,
            "mlp_bias": None,
            "norm_topk_prob": lambda config: config.norm_topk_prob,
            "swiglu_limit": lambda config: config.swiglu_limit is not None,
        },
        windows=windows,
    )
}
