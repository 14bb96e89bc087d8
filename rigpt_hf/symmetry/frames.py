"""
The table of frames: how every axis of every parameter turns. The single source of truth; nothing else may know it.

A *frame* is a space whose basis is a free choice. A matrix `M` of the frame's group takes its vectors `x` to `M x` and
its covectors, which are paired with vectors, to `M^-T x`. For orthogonal groups the two are the same.

    frame      group                                                     axes that carry it
    stream     O(d), as `n(x)` needs the length of x                     in and out of every layer, positions
    lexical    GL(D)                                                     embeddings, project_in, and the head if tied
    output     GL(D), only with an untied head                           project_out, lm_head
    head_qk    per key-value head: what leaves the attention score and   queries (vectors), keys (covectors)
               rotary positions alone
    head_vo    per key-value head: GL(h)                                 values (vectors), o_proj (covectors)
"""

import re
from dataclasses import dataclass

from ..attention_rigpt import rotary_frequencies
from ..configuration_rigpt import RiGPTConfig
from .groups import GeneralLinear, Group, Orthogonal, RotaryCommutant


@dataclass(frozen=True)
class Frame:
    """A space with a free basis: its group, the number of independent copies, and whether every layer has its own."""

    group: Group
    copies: int = 1
    per_layer: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: its frame, as a vector or a covector of it. `None` in its place: it never turns."""

    frame: str
    covector: bool = False


def frames(config: RiGPTConfig) -> dict[str, Frame]:
    """The frames a configuration has, by name."""
    table = {"stream": Frame(Orthogonal(config.hidden_size))}
    if config.embedding_size is not None:
        table["lexical"] = Frame(GeneralLinear(config.embedding_size))
        if not config.tie_word_embeddings:
            table["output"] = Frame(GeneralLinear(config.embedding_size))
    heads = config.num_key_value_heads
    table["head_qk"] = Frame(_query_key_group(config), heads, per_layer=True)
    table["head_vo"] = Frame(GeneralLinear(config.head_dim), heads, per_layer=True)
    return table


def _query_key_group(config: RiGPTConfig) -> Group:
    """Distances and normalised queries and keys need O(h) where a dot product allows GL(h)."""
    lengths_matter = config.attention_score != "dot" or config.qk_norm
    free = Orthogonal if lengths_matter else GeneralLinear
    if config.position_embedding_type != "rotary":
        return free(config.head_dim)
    rotary_dim = 2 * len(rotary_frequencies(config)[0])
    rest = free(config.head_dim - rotary_dim) if rotary_dim < config.head_dim else None
    return RotaryCommutant(config.head_dim, rotary_dim, scaled=not lengths_matter, rest=rest)


def axes(config: RiGPTConfig) -> dict[str, tuple[Axis | None, ...]]:
    """
    The table: parameter name, with `*` for the number of a layer, to one entry per axis.

    Names are those of `RiGPTForCausalLM` and of `RiGPTForSequenceClassification`; a table lists a parameter whether or
    not this configuration has it, except where an option changes how it turns.
    """
    stream, stream_in = Axis("stream"), Axis("stream", covector=True)
    projected = config.embedding_size is not None
    lexical = Axis("lexical") if projected else stream
    # A tied table serves twice: embeddings are vectors, and the head pairs them with covectors.
    output = Axis("lexical", covector=True) if config.tie_word_embeddings else Axis("output")
    head = (lexical if config.tie_word_embeddings else Axis("output", covector=True)) if projected else stream_in
    query, key = Axis("head_qk"), Axis("head_qk", covector=True)
    value, value_in = Axis("head_vo"), Axis("head_vo", covector=True)
    attention, mlp = "model.layers.*.self_attn.", "model.layers.*.mlp."
    return {
        "model.embed_tokens.weight": (None, lexical),
        "model.project_in.weight": (stream, Axis("lexical", covector=True)),
        "model.embed_positions.weight": (None, stream),
        attention + "q_proj.weight": (query, stream_in),
        attention + "q_proj.bias": (query,),
        attention + "k_proj.weight": (key, stream_in),
        attention + "k_proj.bias": (key,),
        attention + "v_proj.weight": (value, stream_in),
        attention + "v_proj.bias": (value,),
        attention + "o_proj.weight": (stream, value_in),
        attention + "o_proj.bias": (stream,),
        attention + "distance_weight": (None,),
        attention + "rotary_frequencies": (None, None),
        mlp + "gate_proj.weight": (None, stream_in),
        mlp + "gate_proj.bias": (None,),
        mlp + "up_proj.weight": (None, stream_in),
        mlp + "up_proj.bias": (None,),
        mlp + "down_proj.weight": (stream, None),
        mlp + "down_proj.bias": (stream,),
        "project_out.weight": (output, stream_in),
        "project_out.bias": (output,),
        "lm_head.weight": (None, head),
        "score.weight": (None, stream_in),
    }


def row(name: str, table: dict[str, tuple[Axis | None, ...]]) -> tuple[tuple[Axis | None, ...], str]:
    """
    The entry of parameter `name` in `table` and the prefix of its layer's own frames (`""` outside the layers).

    Raises:
        ValueError: if the table has no such parameter. A parameter that nobody said how to turn must not be guessed.
    """
    pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
    if pattern not in table:
        raise ValueError(
            f"The table of frames has no parameter {name!r}, so nothing is known about how it turns. Merge or remove "
            "adapters first; a new architecture option needs its row in rigpt_hf/symmetry/frames.py."
        )
    layer = re.search(r"\.(layers\.\d+)\.", name)
    return table[pattern], f"{layer[1]}." if layer else ""
