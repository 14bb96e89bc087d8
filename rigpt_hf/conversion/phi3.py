"""Phi-3 and Phi-4: Llama's network, with one map for queries, keys and values and one for gates and neurons."""

from collections.abc import Callable

from transformers import Phi3Config, Phi3ForCausalLM

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .dropout import vector_dropout
from .llama import (
    ONE_WINDOW,
    UNBIASED,
    Expressed,
    head_dim,
    heads_share_stream,
    in_part,
    kin_config,
    kin_target,
    one_window,
    sight,
)
from .maps import Architecture


def part(index: int) -> Callable[[Phi3Config], Rows]:
    """Queries, keys or values in the map that makes all three."""

    def rows(config: Phi3Config) -> Rows:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        start, length, period = (head_dim(config) * count for count in (sum(heads[:index]), heads[index], sum(heads)))
        return Rows(start, length, period)

    return rows


def half(index: int) -> Callable[[Phi3Config], Rows]:
    """Gates or neurons in the map that makes both."""
    return lambda config: Rows(
        index * config.intermediate_size, config.intermediate_size, 2 * config.intermediate_size
    )


_QKV, _GATE_UP = "model.layers.{i}.self_attn.qkv_proj", "model.layers.{i}.mlp.gate_up_proj"

PHI3 = UNBIASED.varied(
    "Phi-3",
    {
        "q_proj": {"source": _QKV, "rows": part(0)},
        "k_proj": {"source": _QKV, "rows": part(1)},
        "v_proj": {"source": _QKV, "rows": part(2)},
        "gate_proj": {"source": _GATE_UP, "rows": half(0)},
        "up_proj": {"source": _GATE_UP, "rows": half(1)},
    },
)


def rigpt_config(config: Phi3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Phi-3 or Phi-4; see [`kin_config`]."""
    (residual,) = vector_dropout({"resid_pdrop": config.resid_pdrop}, dropout)
    return kin_config(PHI3, config, residual_dropout=residual, **sight(config, False))


def longrope(config: Phi3Config) -> str | None:
    """Frequencies that change while a sequence grows."""
    rope, longest = config.rope_parameters, config.max_position_embeddings
    first = rope.get("original_max_position_embeddings", longest)
    if rope["rope_type"] != "longrope" or longest <= first:
        return None
    return (
        f"`rope_parameters['rope_type']='longrope'` has other frequencies beyond position {first}, and "
        f"`max_position_embeddings={longest}`: Phi-3 computes its cache anew there while it generates, and RiGPT does "
        f"not. If you only use sequences up to {first}, set `max_position_embeddings` to {first} and "
        f"`rope_parameters['factor']` to {rope.get('factor') or longest / first:g} in the source's configuration."
    )


REFUSED = {"rope_parameters['rope_type']='longrope' beyond its first length": longrope}
ARCHITECTURES = {"phi3": Architecture("Phi3ForCausalLM", PHI3, rigpt_config, REFUSED)}


def is_turned_as_phi3(config: RiGPTConfig) -> bool:
    """Whether a Phi-3 has such frequencies; it checks those of 'longrope' against heads that share the stream."""
    kind = (config.rope_parameters or {}).get("rope_type")
    return kind == "default" or (kind == "longrope" and heads_share_stream(config))


def first_length(config: RiGPTConfig) -> int:
    """How long sequences are for which the first frequencies were made."""
    return (config.rope_parameters or {}).get("original_max_position_embeddings", config.max_position_embeddings)


_TURNED: Expressed = {"rope_parameters": is_turned_as_phi3}
TARGETS = {
    "phi3": kin_target(
        Phi3ForCausalLM,
        PHI3,
        "rotary positions of the types 'default' and 'longrope', a gated MLP, one window, no biases and no q/k "
        "normalisation",
        _TURNED | ONE_WINDOW,
        windows=one_window,
        dropouts=("resid_pdrop",),
        rope_parameters=in_part,
        original_max_position_embeddings=first_length,
    )
}
