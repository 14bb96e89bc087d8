"""
The table of frames: how every axis of every parameter turns. The single source of truth; nothing else may know it.

A *frame* is a space whose basis is a free choice; a *group* says which choices leave the function alone; an *axis* of
a parameter lists the frames it turns with and its role in each (see `groups.py`, `permutations.py`), innermost first.

    frame           group                                                    axes that carry it
    stream          O(d), as `n(x)` needs the length of x                    in and out of every layer, positions,
                                                                             gates
    local           O(d), each layer's own stream, with `local_frames`       the same of its layer; the transports
                                                                             into it and out of it
    lexical         GL(D)                                                    embeddings, project_in; head if tied
    output          GL(D), only with an untied head                          project_out, lm_head, score
    head_qk         per key-value head: what leaves the attention score      queries (vectors), keys (covectors), λ,
                    and rotary positions alone                               learned frequencies
    head_vo         per key-value head: GL(h)                                values, value embeddings (vectors), o_proj
                                                                             (covectors)
    heads           permutations of key-value heads, and of the query heads  everything that has an entry per head
                    inside one
    neurons         permutations, and the scalings the activation allows     rows of up and gate, columns of down
    key_shift       a constant added to all keys, where positions leave it   k bias, q bias
                    alone: the softmax does not see it
    value_shift     a constant added to all values arrives as a constant,    v bias, o_proj bias
                    as probabilities sum to 1
    position_shift  a constant moved from all tokens to all positions        embeddings, positions (untied head)

The last three are translations: they add to parameters where the others multiply, and are listed in `SHIFTS`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..attention_rigpt import rotary_frequencies
from ..configuration_rigpt import RiGPTConfig
from .groups import MatrixGroup, Stretch, general_linear, orthogonal
from .permutations import HeadPermutations, NeuronGroup, Translations


Group = MatrixGroup | HeadPermutations | NeuronGroup | Translations
Read = Callable[[str], torch.Tensor]
# `act(a z) = a^p act(z)` for a > 0; activations that are not listed allow no scaling.
DEGREES = {"relu": 1, "relu2": 2}
ATTENTION, MLP = "model.layers.*.self_attn.", "model.layers.*.mlp."
# What carries the stream from one local frame to the next: into a layer, and behind the last.
TRANSPORTS = ("model.layers.*.transport.weight", "model.transport.weight")


@dataclass(frozen=True)
class Frame:
    """
    A space with a free basis.

    Args:
        group: What may act on it.
        copies: How many independent elements there are (one per key-value head, or one).
        per_layer: Whether every layer has its own.
        carrier: The frame of permutations that moves the copies about.
    """

    group: Group
    copies: int = 1
    per_layer: bool = False
    carrier: str | None = None


@dataclass(frozen=True)
class Turn:
    """
    One frame that an axis turns with, and as what.

    Args:
        frame, role: Of it.
        step: The layer meant, counted from the parameter's own; outside the layers, from behind the last.
    """

    frame: str
    role: str = "vector"
    step: int = 0


Axis = tuple[Turn, ...]
FIXED: Axis = ()


def frames(config: RiGPTConfig) -> dict[str, Frame]:
    """The frames a configuration has, by name, in the order in which they act on an axis."""
    heads, repeats = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    table = {"stream": Frame(orthogonal(config.hidden_size))}
    if config.local_frames:
        table["local"] = Frame(orthogonal(config.hidden_size), per_layer=True)
    if config.embedding_size is not None:
        table["lexical"] = Frame(general_linear(config.embedding_size))
        if not config.tie_word_embeddings:
            table["output"] = Frame(general_linear(config.embedding_size))
    score = _score_group(config)
    # Interpolation adds weights of neighbouring layers, which must then be in the same frame.
    own = config.depth_interpolation == "constant"
    table["head_qk"] = Frame(score, heads, per_layer=own, carrier="heads")
    table["head_vo"] = Frame(general_linear(config.head_dim), heads, per_layer=own, carrier="heads")
    table["heads"] = Frame(HeadPermutations(heads, repeats), per_layer=own)
    degree = DEGREES.get(config.hidden_act)
    table["neurons"] = Frame(NeuronGroup(config.intermediate_size, degree, config.gated_mlp), per_layer=own)
    still = _unturned(config)
    if config.attention_bias and still and not config.qk_norm and config.attention_score != "distance":
        # Unless λ multiplies it, a constant per layer stays a constant when it is interpolated.
        constant = own or config.attention_score == "dot"
        table["key_shift"] = Frame(Translations(config.head_dim, still), heads, per_layer=constant)
    if config.attention_bias and config.attention_output_bias:
        table["value_shift"] = Frame(Translations(config.head_dim), heads, per_layer=own)
    if config.position_embedding_type == "learned" and not config.tie_word_embeddings:
        table["position_shift"] = Frame(Translations(config.lexical_size))
    return table


def _score_group(config: RiGPTConfig) -> MatrixGroup:
    """What leaves the attention score of a head alone."""
    stretch: Stretch = "free"
    if config.qk_norm or config.attention_score == "distance":
        stretch = "none"
    elif config.attention_score == "squared_distance":
        stretch = "common"  # q/s, s k and λ/s² give the same q·k - λ|k|²/2
    moving = _plane_count(config)
    turned = set(range(config.head_dim)) - set(_unturned(config))
    # Rotary positions turn dimension i together with i + r/2.
    planes = tuple((i, i + moving) for i in range(moving) if i in turned)
    return MatrixGroup(config.head_dim, stretch, planes, movable=config.rotary_learned_frequencies)


def _plane_count(config: RiGPTConfig) -> int:
    return 0 if config.position_embedding_type != "rotary" else len(rotary_frequencies(config)[0])


def _unturned(config: RiGPTConfig) -> tuple[int, ...]:
    """Dimensions of a head that positions leave alone: outside of all planes, or in planes of frequency zero."""
    if config.position_embedding_type != "rotary":
        return tuple(range(config.head_dim))
    frequencies = rotary_frequencies(config)[0].tolist()
    half = len(frequencies)
    resting = [] if config.rotary_learned_frequencies else [i for i, value in enumerate(frequencies) if value == 0]
    return tuple(sorted([*resting, *(i + half for i in resting), *range(2 * half, config.head_dim)]))


def axes(config: RiGPTConfig) -> dict[str, tuple[Axis, ...]]:
    """
    The table: parameter name, with `*` for the number of a layer, to one entry per axis; a single entry runs over all
    axes of the tensor together.

    Names are those of `RiGPTForCausalLM` and of `RiGPTForSequenceClassification`; a table lists a parameter whether or
    not this configuration has it, except where an option changes how it turns.
    """
    stream, stream_in = (Turn("stream"),), (Turn("stream", "covector"),)
    projected = config.embedding_size is not None
    lexical = (Turn("lexical"),) if projected else stream
    # A tied table serves twice: embeddings are vectors, and the head pairs them with covectors.
    output = (Turn("lexical", "covector"),) if config.tie_word_embeddings else (Turn("output"),)
    untied_head = (Turn("output", "covector"),) if projected else stream_in
    head = lexical if config.tie_word_embeddings else untied_head
    query = (Turn("head_qk"), Turn("heads", "query"))
    key = (Turn("head_qk", "covector"), Turn("heads", "key_value"))
    value = (Turn("head_vo"), Turn("heads", "key_value"))
    value_in = (Turn("head_vo", "covector"), Turn("heads", "query"))
    # What reads and writes inside of a layer; the frame before the first layer's is the stream's.
    inner = "local" if config.local_frames else "stream"
    layer_out, layer_in = (Turn(inner),), (Turn(inner, "covector"),)
    before = (Turn("local", "covector", step=-1),)
    active, linear, down = ((Turn("neurons", role),) for role in ("active", "linear", "down"))
    up = linear if config.gated_mlp else active
    return {
        "model.embed_tokens.weight": (FIXED, lexical),
        "model.project_in.weight": (stream, (Turn("lexical", "covector"),)),
        "model.embed_positions.weight": (FIXED, stream),
        ATTENTION + "q_proj.weight": (query, layer_in),
        ATTENTION + "q_proj.bias": (query,),
        ATTENTION + "k_proj.weight": (key, layer_in),
        ATTENTION + "k_proj.bias": (key,),
        ATTENTION + "v_proj.weight": (value, layer_in),
        ATTENTION + "v_proj.bias": (value,),
        ATTENTION + "o_proj.weight": (layer_out, value_in),
        ATTENTION + "o_proj.bias": (layer_out,),
        ATTENTION + "distance_weight": ((Turn("head_qk", "metric"), Turn("heads", "query")),),
        ATTENTION + "rotary_frequencies": ((Turn("head_qk", "planes"), Turn("heads", "key_value")),),
        ATTENTION + "value_embedding.weight": (FIXED, value),
        ATTENTION + "value_gate.weight": ((Turn("heads", "key_value"),), layer_in),
        MLP + "gate_proj.weight": (active, layer_in),
        MLP + "gate_proj.bias": (active,),
        MLP + "up_proj.weight": (up, layer_in),
        MLP + "up_proj.bias": (up,),
        MLP + "down_proj.weight": (layer_out, down),
        MLP + "down_proj.bias": (layer_out,),
        TRANSPORTS[0]: (layer_out, before),
        TRANSPORTS[1]: (stream, before),
        "model.project_out.weight": (output, stream_in),
        "model.project_out.bias": (output,),
        "lm_head.weight": (FIXED, head),
        "score.weight": (FIXED, head),
    }


@dataclass(frozen=True)
class Shift:
    """
    How one frame of translations moves parameters by a vector `c`.

    Args:
        like: The parameter whose last axis `c` turns with, when another transformation is done after it.
        moves: Parameter to its change, a function of `c` `[copies · n]` that may read other parameters (before they
            change) and is linear in `c`.
    """

    like: str
    moves: dict[str, Callable[[torch.Tensor, Read], torch.Tensor]]


def shifts(config: RiGPTConfig) -> dict[str, Shift]:
    """The table of translations; for those frames of a configuration that are [`Translations`]."""
    heads, repeats = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads

    def per_query_head(vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(heads, 1, -1).expand(-1, repeats, -1).reshape(heads * repeats, -1)

    keys = {ATTENTION + "k_proj.bias": lambda c, read: c}
    if config.attention_score == "squared_distance":
        weight = ATTENTION + "distance_weight"
        # (q + λc)·(k + c) - λ|k + c|²/2 differs from q·k - λ|k|²/2 by what is the same for all keys.
        keys[ATTENTION + "q_proj.bias"] = lambda c, read: (read(weight)[:, None] * per_query_head(c)).flatten()
    values = {
        ATTENTION + "v_proj.bias": lambda c, read: c,
        ATTENTION + "o_proj.bias": lambda c, read: -read(ATTENTION + "o_proj.weight") @ per_query_head(c).flatten(),
    }
    tokens, into = "model.embed_tokens.weight", "model.project_in.weight"
    projected = config.embedding_size is not None
    positions = {
        tokens: lambda c, read: c,
        "model.embed_positions.weight": lambda c, read: -(read(into) @ c) if projected else -c,
    }
    return {
        "key_shift": Shift(ATTENTION + "k_proj.bias", keys),
        "value_shift": Shift(ATTENTION + "v_proj.bias", values),
        "position_shift": Shift(tokens, positions),
    }


def row(name: str, table: dict[str, tuple[Axis, ...]]) -> tuple[tuple[Axis, ...], str]:
    """
    The entry of parameter `name` in `table` and the prefix of its layer's own frames (`""` outside the layers).

    Raises:
        ValueError: if the table has no such parameter. A parameter that nobody said how to turn must not be guessed.
    """
    pattern = pattern_of(name)
    if pattern not in table and f"model.{pattern}" in table:
        raise ValueError(
            f"Parameters must have the names of a model with its head, got {name!r}, which is the bare "
            "`RiGPTModel`'s. Pass the `RiGPTForCausalLM` that it belongs to."
        )
    if pattern not in table:
        raise ValueError(
            f"The table of frames has no parameter {name!r}, so nothing is known about how it turns. Merge or remove "
            "adapters first; a new architecture option needs its row in rigpt_hf/symmetry/frames.py."
        )
    return table[pattern], layer_of(name)


def pattern_of(name: str) -> str:
    """A parameter's name with `*` for the number of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def layer_of(name: str) -> str:
    """The prefix of the frames of a parameter's own layer, `layers.3.`; `""` outside the layers."""
    layer = re.search(r"\.(layers\.\d+)\.", name)
    return f"{layer[1]}." if layer else ""


def in_layer(pattern: str, prefix: str) -> str:
    """The parameter that `pattern` means in the layer of the frames' prefix `layers.3.`; without one in the first."""
    return pattern.replace("layers.*.", prefix or "layers.0.")


def frame_keys(config: RiGPTConfig) -> dict[str, Frame]:
    """All frames of a configuration, those that every layer has of its own once per layer: `layers.3.head_qk`."""
    keys = {}
    for name, frame in frames(config).items():
        prefixes = [f"layers.{index}." for index in range(config.num_hidden_layers)] if frame.per_layer else [""]
        keys.update({prefix + name: frame for prefix in prefixes})
    return keys


def key_of(turn: Turn, layer: str, keys: Mapping[str, Frame]) -> str:
    """
    The key in `keys` ([`frame_keys`]) of the frame that a turn of a parameter means.

    Args:
        turn, layer: As [`row`] gives them. Before the first layer's own stream there is the stream of all.
    """
    if turn.frame in keys:
        return turn.frame
    if turn.step:
        count = sum(kind_of(key) == turn.frame for key in keys)
        index = (int(layer.split(".")[1]) if layer else count) + turn.step
        if index < 0:
            return "stream"
        layer = f"layers.{index}."
    return layer + turn.frame


def refuse_shared_frames(config: RiGPTConfig, what: str) -> None:
    """Raises a `ValueError` for `what` has not been worked out where layers share the frames of heads and neurons."""
    if config.depth_interpolation != "constant":
        raise ValueError(
            f"{what} needs layers with frames of their own, got `depth_interpolation="
            f"{config.depth_interpolation!r}`, which adds weights of neighbours. Use 'constant'."
        )


def kind_of(key: str) -> str:
    """The frame's name in a key: `head_qk` of `layers.3.head_qk`."""
    return key.rsplit(".", 1)[-1]


def prefix_of(key: str) -> str:
    """The layer in a key: `layers.3.` of `layers.3.head_qk`."""
    return key[: len(key) - len(kind_of(key))]
