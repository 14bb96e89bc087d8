"""Cohere (Command R): attention and MLP read one norm side by side, neighbours turn together, logits have a scale."""

from typing import Any

from transformers import Cohere2Config, Cohere2ForCausalLM, CohereConfig, CohereForCausalLM

from ..configuration_rigpt import RiGPTConfig
from ..layers_rigpt import FULL, SLIDING, is_turned
from .ernie4_5 import interleaved
from .llama import (
    ATTENTION_BIASES,
    LLAMA,
    PARTIAL,
    ROTARY,
    WINDOWS,
    Expressed,
    kin_config,
    kin_target,
    layers_in_sight,
    sight,
)
from .maps import Architecture, Family
from .qwen3 import OWN_IF_ANY, with_head_gains


def logit_scale(config: CohereConfig, layer: int) -> float:
    """The factor of logits."""
    return config.logit_scale


_ONE_NORM = {"norm": "model.layers.{i}.input_layernorm"}

COHERE = LLAMA.varied(
    "Cohere",
    {
        "q_proj": {"rows": interleaved},
        "k_proj": {"rows": interleaved},
        "gate_proj": _ONE_NORM,
        "up_proj": _ONE_NORM,
        "project_out": {"scale": logit_scale},
        "lm_head": {"scale": logit_scale},
    },
    fields={**LLAMA.fields, "rms_norm_eps": "layer_norm_eps"},
    centred=True,
    options=ATTENTION_BIASES | {"qk_norm": "use_qk_norm"},
)

COHERE2 = COHERE.varied("Cohere 2", options=ATTENTION_BIASES)


def variant(config: CohereConfig) -> Family:
    """The weight map of a Cohere, every head of which may have a norm of its own."""
    return with_head_gains(COHERE, rows=interleaved, mean=True) if config.use_qk_norm else COHERE


def rigpt_config(config: CohereConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Cohere; see [`kin_config`]."""
    gain = "vector_per_head" if config.use_qk_norm else None
    return kin_config(COHERE, config, use_parallel_residual=True, qk_norm_gain=gain)


def turned_layers(config: Any) -> list[int]:
    """The layers of a Cohere 2 that positions turn: those that slide."""
    return [int(kind == SLIDING) for kind in (config.layer_types or [FULL])[: config.num_hidden_layers]]


def cohere2_config(config: Cohere2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Cohere 2, where positions turn those layers alone that look through a window."""
    turned = turned_layers(config)
    return kin_config(
        COHERE2,
        config,
        use_parallel_residual=True,
        no_rope_layers=None if all(turned) else turned,
        **sight(config, True),
    )


ARCHITECTURES = {
    "cohere": Architecture("CohereForCausalLM", COHERE, rigpt_config, PARTIAL, variant),
    "cohere2": Architecture("Cohere2ForCausalLM", COHERE2, cohere2_config, PARTIAL),
}
_PARALLEL: Expressed = {"use_parallel_residual": lambda config: config.use_parallel_residual}
_COHERE2: Expressed = WINDOWS | {
    "no_rope_layers": lambda config: all(
        bool(turned) is is_turned(config, layer) for layer, turned in enumerate(turned_layers(config))
    ),
}
_SUMMARY = f"{ROTARY}, LayerNorms without biases, attention and a gated MLP side by side"
TARGETS = {
    "cohere": kin_target(
        CohereForCausalLM, COHERE, _SUMMARY, _PARALLEL | OWN_IF_ANY, variant=variant, logit_scale=1.0
    ),
    "cohere2": kin_target(
        Cohere2ForCausalLM,
        COHERE2,
        f"{_SUMMARY}, no q/k normalisation, positions in layers with a window and in no others",
        _PARALLEL | _COHERE2,
        windows=layers_in_sight,
        logit_scale=1.0,
    ),
}
