"""Gemma 1, 2 and 3: Llama's weight map, gains stored as their difference from 1, embeddings times `sqrt(d)`."""

from dataclasses import replace

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

from ..configuration_rigpt import RiGPTConfig
from .llama import (
    ATTENTION_BIASES,
    BY_TYPE,
    LLAMA,
    PARTIAL,
    ROTARY,
    WINDOWS,
    Expressed,
    by_type,
    head_dim,
    kin_config,
    kin_target,
    layers_in_sight,
    sight,
)
from .maps import Architecture, Family, Rule, only, same
from .qwen3 import with_head_gains


def embedding_scale(config: GemmaConfig, layer: int) -> float:
    """The factor of embeddings on the way into the residual stream."""
    return config.hidden_size**0.5


def query_scale(config: Gemma2Config | Gemma3TextConfig, layer: int) -> float:
    """The factor of queries, in units of `1 / sqrt(head_dim)`."""
    return (head_dim(config) / config.query_pre_attn_scalar) ** 0.5


def with_output_norms(family: Family, attention: str, mlp: str) -> Family:
    """A family whose blocks have norms behind them, of these names."""
    layer = "model.layers.{i}"
    rules = (
        Rule("model.carry"),
        Rule(f"{layer}.attention_output_norm", norm=f"{layer}.{attention}"),
        Rule(f"{layer}.mlp_output_norm", norm=f"{layer}.{mlp}"),
    )
    return replace(family, rules=(*family.rules, *rules))


# Rounded when a model is made, to 55.5 instead of 55.426 in 16 bits, whatever dtype the model has later.
_SCALED = {"scale": embedding_scale, "buffer": "model.embed_tokens.embed_scale"}
_MLP = {"norm": "model.layers.{i}.pre_feedforward_layernorm"}

GEMMA = LLAMA.varied(
    "Gemma", {"embed_tokens": _SCALED, "project_in": _SCALED}, gain_offset=1.0, options=ATTENTION_BIASES
)
_GEMMA2 = with_output_norms(
    GEMMA.varied("Gemma 2", {"gate_proj": _MLP, "up_proj": _MLP}),
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)
GEMMA2 = _GEMMA2.varied(
    "Gemma 2",
    {"q_proj": {"scale": query_scale}},
    options=ATTENTION_BIASES | same("attn_logit_softcapping", "final_logit_softcapping"),
)
# Which has a cap for scores in its configuration and does not read it.
GEMMA3 = with_head_gains(_GEMMA2).varied(
    "Gemma 3",
    {"q_norm": {"scale": query_scale}},
    options=ATTENTION_BIASES | same("final_logit_softcapping"),
)


def rigpt_config(config: GemmaConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Gemma; see [`kin_config`]."""
    return kin_config(GEMMA, config)


def gemma2_config(config: Gemma2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Gemma 2."""
    return kin_config(GEMMA2, config, "hidden_activation", post_norm=True, **sight(config, True))


def gemma3_config(config: Gemma3TextConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for the text model of a Gemma 3."""
    gains = {"qk_norm": True, "qk_norm_gain": "vector"}
    return kin_config(GEMMA3, config, "hidden_activation", post_norm=True, **gains, **sight(config, True))


def size_of_heads(config: RiGPTConfig) -> int:
    """The scalar with which a stock class scales queries as a RiGPT does."""
    return config.head_dim


BIDIRECTIONAL = only(
    "use_bidirectional_attention",
    (None, False),
    "these layers see what comes after them, and RiGPT's do not",
    "Convert a Gemma that is a language model",
)
ARCHITECTURES = {
    "gemma": Architecture("GemmaForCausalLM", GEMMA, rigpt_config, PARTIAL | BIDIRECTIONAL),
    "gemma2": Architecture("Gemma2ForCausalLM", GEMMA2, gemma2_config, PARTIAL | BIDIRECTIONAL),
    "gemma3_text": Architecture("Gemma3ForCausalLM", GEMMA3, gemma3_config, PARTIAL | BIDIRECTIONAL),
}
# Its configuration takes the other GELU for this one.
_GELU: Expressed = {"hidden_act": lambda config: config.hidden_act != "gelu"}
OUTPUT_NORMS: Expressed = {"post_norm": lambda config: config.post_norm}
_NORMED = f"{ROTARY}, norms in front of blocks and behind them, a gated MLP without biases"
TARGETS = {
    "gemma": kin_target(GemmaForCausalLM, GEMMA, f"{ROTARY}, a gated MLP without biases, no q/k normalisation", _GELU),
    "gemma2": kin_target(
        Gemma2ForCausalLM,
        GEMMA2,
        f"{_NORMED}, no q/k normalisation",
        OUTPUT_NORMS | WINDOWS,
        windows=layers_in_sight,
        activation="hidden_activation",
        query_pre_attn_scalar=size_of_heads,
    ),
    "gemma3_text": kin_target(
        Gemma3ForCausalLM,
        GEMMA3,
        f"{_NORMED}, and q/k normalisation",
        OUTPUT_NORMS | WINDOWS | BY_TYPE | {"qk_norm": lambda config: config.qk_norm, "qk_norm_gain": None},
        windows=layers_in_sight,
        activation="hidden_activation",
        rope_parameters=by_type,
        query_pre_attn_scalar=size_of_heads,
    ),
}
