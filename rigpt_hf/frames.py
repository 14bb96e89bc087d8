"""
The table of frames: how every axis of every parameter turns. The single source of truth; nothing else may know it.

A *frame* is a space whose basis is a free choice; a *group* says which choices leave the function alone; an *axis* of
a parameter lists the frames it turns with and its role in each (see `groups/`), innermost first. [`table_of`] gives
the [`Table`] of a configuration, which answers all questions about it.

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

The last three are translations: they add to parameters where the others multiply; `_shifts` says what and where.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple

import torch

from .configuration_rigpt import RiGPTConfig, rotary_frequencies
from .groups import (
    Group,
    HeadPermutations,
    MatrixGroup,
    NeuronGroup,
    Stretch,
    Translations,
    general_linear,
    orthogonal,
)
from .scores_rigpt import SCORES


Read = Callable[[str], torch.Tensor]
# `act(a z) = a^p act(z)` for a > 0; activations that are not listed allow no scaling.
DEGREES = {"relu": 1, "relu2": 2}
ATTENTION, MLP = "model.layers.*.self_attn.", "model.layers.*.mlp."
# Frames that are one once weights are balanced.
STREAMS = ("stream", "local")
# What carries the residual stream from one local frame to the next: into a layer, and after the last.
TRANSPORTS = ("model.layers.*.transport.weight", "model.transport.weight")


class FrameKey(NamedTuple):
    """One frame of a model: its kind, and its layer where every layer has one of its own. `layers.3.head_qk`."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> "FrameKey":
        """The key that a string means, as saved transformations have them."""
        layered = re.fullmatch(r"layers\.(\d+)\.(\w+)", text)
        return cls(layered[2], int(layered[1])) if layered else cls(text)


@dataclass(frozen=True)
class Move:
    """How a translation by `c` `[copies · n]` moves one parameter: by `change(c, *others)`, linear in `c`."""

    change: Callable[..., torch.Tensor]
    # Parameters that `change` needs besides, as they were before.
    reads: tuple[str, ...] = ()

    def __call__(self, vector: torch.Tensor, read: Read) -> torch.Tensor:
        return self.change(vector, *map(read, self.reads))


@dataclass(frozen=True)
class Shift:
    """
    What a frame of translations does to parameters.

    Args:
        like: The parameter whose last axis `c` turns with, when another transformation is done after it.
        moves: Parameter to its change.
    """

    like: str
    moves: dict[str, Move]

    @property
    def constant(self) -> bool:
        """Whether no other weight says how far to move."""
        return not any(move.reads for move in self.moves.values())


@dataclass(frozen=True)
class Frame:
    """
    A space with a free basis.

    Args:
        group: What may act on it.
        copies: How many independent elements there are (one per key-value head, or one).
        per_layer: Whether every layer has its own.
        carrier: The frame of permutations that moves the copies about.
        shift: What translations move.
    """

    group: Group
    copies: int = 1
    per_layer: bool = False
    carrier: str | None = None
    shift: Shift | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Turn:
    """
    One frame that an axis turns with, and as what.

    Args:
        frame, role: Of it.
        step: The layer meant, counted from the parameter's own; outside the layers, from after the last.
    """

    frame: str
    role: str = "vector"
    step: int = 0


Axis = tuple[Turn, ...]
FIXED: Axis = ()


class Turned(NamedTuple):
    """One axis of one parameter with one frame that it turns with; `flat`: all axes of the tensor together."""

    dim: int
    key: FrameKey
    role: str
    flat: bool

    def unfold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The axis first and everything else after it: `[length, rest]`."""
        front = tensor.flatten() if self.flat else tensor.movedim(self.dim, 0)
        return front.reshape(len(front), -1)

    def fold(self, front: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A tensor of this shape again."""
        if self.flat:
            return front.reshape(shape)
        return front.reshape(shape[self.dim], *shape[: self.dim], *shape[self.dim + 1 :]).movedim(0, self.dim)


def _frames(config: RiGPTConfig) -> dict[str, Frame]:
    """The frames a configuration has, by kind, in the order in which they act on an axis."""
    heads, repeats = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    shifts = _shifts(config)
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
    still, key_shift = _unturned(config), SCORES[config.attention_score].key_shift
    if config.attention_bias and still and not config.qk_norm and key_shift != "never":
        # Unless λ multiplies it, a constant per layer stays a constant when it is interpolated.
        constant = own or key_shift == "alone"
        table["key_shift"] = Frame(Translations(config.head_dim, still), heads, constant, shift=shifts["key_shift"])
    if config.attention_bias and config.attention_output_bias:
        table["value_shift"] = Frame(Translations(config.head_dim), heads, own, shift=shifts["value_shift"])
    if config.position_embedding_type == "learned" and not config.tie_word_embeddings:
        table["position_shift"] = Frame(Translations(config.lexical_size), shift=shifts["position_shift"])
    return table


def _score_group(config: RiGPTConfig) -> MatrixGroup:
    """What leaves the attention score of a head alone."""
    stretch: Stretch = "none" if config.qk_norm else SCORES[config.attention_score].stretch
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


def _rows(config: RiGPTConfig) -> dict[str, tuple[Axis, ...]]:
    """
    The table: parameter name, with `*` for the number of a layer, to one entry per axis; a single entry runs over all
    axes of the tensor together. In the order of a model's parameters, in which sums over them are taken.

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
        TRANSPORTS[0]: (layer_out, before),
        ATTENTION + "distance_weight": ((Turn("head_qk", "metric"), Turn("heads", "query")),),
        ATTENTION + "rotary_frequencies": ((Turn("head_qk", "planes"), Turn("heads", "key_value")),),
        ATTENTION + "q_proj.weight": (query, layer_in),
        ATTENTION + "q_proj.bias": (query,),
        ATTENTION + "k_proj.weight": (key, layer_in),
        ATTENTION + "k_proj.bias": (key,),
        ATTENTION + "v_proj.weight": (value, layer_in),
        ATTENTION + "v_proj.bias": (value,),
        ATTENTION + "o_proj.weight": (layer_out, value_in),
        ATTENTION + "o_proj.bias": (layer_out,),
        ATTENTION + "value_embedding.weight": (FIXED, value),
        ATTENTION + "value_gate.weight": ((Turn("heads", "key_value"),), layer_in),
        MLP + "gate_proj.weight": (active, layer_in),
        MLP + "gate_proj.bias": (active,),
        MLP + "up_proj.weight": (up, layer_in),
        MLP + "up_proj.bias": (up,),
        MLP + "down_proj.weight": (layer_out, down),
        MLP + "down_proj.bias": (layer_out,),
        TRANSPORTS[1]: (stream, before),
        "model.project_out.weight": (output, stream_in),
        "model.project_out.bias": (output,),
        "lm_head.weight": (FIXED, head),
        "score.weight": (FIXED, head),
    }


def _shifts(config: RiGPTConfig) -> dict[str, Shift]:
    """The table of translations, by kind of frame; parameters with `*` for the number of the layer."""
    heads, repeats = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads

    def per_query_head(vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(heads, 1, -1).expand(-1, repeats, -1).reshape(heads * repeats, -1)

    whole = Move(lambda c: c)
    keys = {ATTENTION + "k_proj.bias": whole}
    if SCORES[config.attention_score].key_shift == "with_query":
        # (q + λc)·(k + c) - λ|k + c|²/2 differs from q·k - λ|k|²/2 by what is the same for all keys.
        keys[ATTENTION + "q_proj.bias"] = Move(
            lambda c, weight: (weight[:, None] * per_query_head(c)).flatten(), (ATTENTION + "distance_weight",)
        )
    values = {
        ATTENTION + "v_proj.bias": whole,
        ATTENTION + "o_proj.bias": Move(
            lambda c, output: -output @ per_query_head(c).flatten(), (ATTENTION + "o_proj.weight",)
        ),
    }
    tokens, into = "model.embed_tokens.weight", "model.project_in.weight"
    away = Move(lambda c: -c) if config.embedding_size is None else Move(lambda c, into: -(into @ c), (into,))
    return {
        "key_shift": Shift(ATTENTION + "k_proj.bias", keys),
        "value_shift": Shift(ATTENTION + "v_proj.bias", values),
        "position_shift": Shift(tokens, {tokens: whole, "model.embed_positions.weight": away}),
    }


def refuse_shared_frames(config: RiGPTConfig, what: str) -> None:
    """Raises a `ValueError` for `what` has not been worked out where layers share the frames of heads and neurons."""
    if config.depth_interpolation != "constant":
        raise ValueError(
            f"{what} needs layers with frames of their own, got `depth_interpolation="
            f"{config.depth_interpolation!r}`, which adds weights of neighbours. Use 'constant'."
        )


# Tables are kept for so many configurations.
KEPT = 32
_TABLES: "dict[tuple[str, ...], Table]" = {}


def table_of(config: RiGPTConfig) -> "Table":
    """The table of a configuration; made once for the values that its fields have now."""
    values = tuple(repr(getattr(config, name, None)) for name in RiGPTConfig.__annotations__)
    if values not in _TABLES:
        if len(_TABLES) >= KEPT:
            _TABLES.pop(next(iter(_TABLES)))
        _TABLES[values] = Table(config)
    return _TABLES[values]


class Table:
    """
    The table of frames of one configuration; see the head of this file.

    Attributes:
        kinds (`Mapping[str, Frame]`): the frames by kind, in the order in which they act on an axis.
        frames (`Mapping[FrameKey, Frame]`): the same, those that every layer has of its own once per layer.
        shifts (`Mapping[FrameKey, Shift]`): what the translations among them move.
        streams (`tuple[FrameKey, ...]`): the frames of the residual stream, one of each layer with local frames.
        transports (`tuple[str, ...]`): the parameters between those, from the first to the last.
        names (`tuple[str, ...]`): every parameter that the table knows, whether or not the configuration has it.
    """

    def __init__(self, config: RiGPTConfig):
        self._layers = config.num_hidden_layers
        self._rows = _rows(config)
        self._turns: dict[str, tuple[Turned, ...]] = {}
        self.kinds: Mapping[str, Frame] = _frames(config)
        self.frames: Mapping[FrameKey, Frame] = {
            FrameKey(kind, layer): frame
            for kind, frame in self.kinds.items()
            for layer in (range(self._layers) if frame.per_layer else [None])
        }
        self.streams = tuple(key for key in self.frames if key.kind in STREAMS)
        self.names = tuple(self._expand(self._rows))
        self.transports = tuple(self._expand(TRANSPORTS)) if "local" in self.kinds else ()
        self.shifts: Mapping[FrameKey, Shift] = {
            key: self._shift(frame.shift, key.layer) for key, frame in self.frames.items() if frame.shift is not None
        }

    def turns(self, name: str) -> tuple[Turned, ...]:
        """
        How a parameter turns: axis after axis, the frames of each from the innermost out.

        Raises:
            ValueError: if the table has no such parameter.
        """
        if name not in self._turns:
            entry, layer = self.row(name), layer_of(name)
            self._turns[name] = tuple(
                Turned(dim, self._key(turn, layer), turn.role, len(entry) == 1)
                for dim, axis in enumerate(entry)
                for turn in axis
            )
        return self._turns[name]

    def rank(self, name: str) -> int:
        """How many axes of a parameter the table tells apart; 1 if they run together."""
        return len(self.row(name))

    def carriers(self, key: FrameKey, role: str | None = None) -> tuple[tuple[str, int], ...]:
        """The parameters that carry a frame (in one role), and the axes with which they do."""
        return tuple((name, turned.dim) for name, turned in self.walk(key) if role in (None, turned.role))

    @property
    def carried(self) -> tuple[FrameKey, ...]:
        """The frames that parameters carry, all but translations, in the order in which parameters come to them."""
        return tuple(self._carriers)

    def walk(self, key: FrameKey) -> tuple[tuple[str, Turned], ...]:
        """The same, with the whole entry of the table."""
        return self._carriers.get(key, ())

    def role_on(self, name: str, kind: str) -> Literal["reads", "writes", "rows"] | None:
        """
        How a parameter meets the frames of one kind: it `"writes"` into them with its first axis, `"reads"` them with
        its last, or its `"rows"` are vectors of them; `None` if it does not carry them.
        """
        turns = self.turns(name)
        carried = [turned for turned in turns if turned.key.kind == kind]
        if not carried:
            return None
        if any(turned.dim == 0 for turned in carried):
            return "writes"
        table_of_rows = all(turned.dim and turned.role != "covector" for turned in turns)
        return "rows" if table_of_rows else "reads"

    def moved(self, name: str) -> list[tuple[FrameKey, Move]]:
        """The translations that change a parameter, and how."""
        return [(key, shift.moves[name]) for key, shift in self.shifts.items() if name in shift.moves]

    @cached_property
    def _carriers(self) -> dict[FrameKey, tuple[tuple[str, Turned], ...]]:
        index: dict[FrameKey, list[tuple[str, Turned]]] = {}
        for name in self.names:
            for turned in self.turns(name):
                if turned.key in self.frames:
                    index.setdefault(turned.key, []).append((name, turned))
        return {key: tuple(found) for key, found in index.items()}

    def row(self, name: str) -> tuple[Axis, ...]:
        """
        A parameter's row as it is written: one entry per axis, or one for all of them together.

        Raises:
            ValueError: if the table has no such parameter. A parameter that nobody said how to turn must not be
                guessed.
        """
        pattern = _pattern_of(name)
        if pattern in self._rows:
            return self._rows[pattern]
        if f"model.{pattern}" in self._rows:
            raise ValueError(
                f"Parameters must have the names of a model with its head, got {name!r}, which is the bare "
                "`RiGPTModel`'s. Pass the `RiGPTForCausalLM` that it belongs to."
            )
        raise ValueError(
            f"The table of frames has no parameter {name!r}, so nothing is known about how it turns. Merge or remove "
            "adapters first; a new architecture option needs its row in rigpt_hf/frames.py."
        )

    def _key(self, turn: Turn, layer: int | None) -> FrameKey:
        """The frame that a turn of a parameter means. Before the first layer's own stream there is that of all."""
        frame = self.kinds.get(turn.frame)
        if frame is None or not frame.per_layer:
            return FrameKey(turn.frame)
        index = (self._layers if layer is None else layer) + turn.step
        return FrameKey(turn.frame, index) if index >= 0 else FrameKey("stream")

    def _expand(self, patterns: Iterable[str]) -> list[str]:
        """Names of parameters, layer by layer."""
        names: list[str] = []
        for layered, group in groupby(patterns, key=lambda pattern: "*" in pattern):
            part = list(group)
            names += [_at(pattern, index) for index in range(self._layers) for pattern in part] if layered else part
        return names

    def _shift(self, shift: Shift, layer: int | None) -> Shift:
        """With the names of one layer, or, where all layers share the frame, of every layer."""
        moves = {}
        for index in range(self._layers) if layer is None else [layer]:
            for pattern, move in shift.moves.items():
                reads = tuple(_at(name, index) for name in move.reads)
                moves[_at(pattern, index)] = Move(move.change, reads)
        return Shift(_at(shift.like, layer or 0), moves)


def is_transport(name: str) -> bool:
    """Whether a parameter carries the residual stream from one local frame to the next."""
    return _pattern_of(name) in TRANSPORTS


def layer_of(name: str) -> int | None:
    """The number of a parameter's layer, `None` outside the layers."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else None


def _pattern_of(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def _at(pattern: str, layer: int) -> str:
    return pattern.replace("*", str(layer))
