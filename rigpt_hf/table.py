"""The table of frames: its records, and the questions it answers. Its content is in `frames.py`."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple

import torch

from .groups import Group


Read = Callable[[str], torch.Tensor]
# Frames that are one once weights are balanced.
STREAMS = ("stream", "local")
# Representations of axes that read from a frame.
READING = ("covector", "down")
# Those of axes of neurons, which change places and lengths and do not turn.
NEURONS = ("active", "linear", "down")


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
    The action of a frame of translations on parameters.

    Args:
        like: The parameter with which `c` turns, when another transformation is done after it.
        moves: Parameter to its change.
        axis: The axis of `like` that it turns with; `None`: with none, as `c` is one number, added to all of `like`.
    """

    like: str
    moves: dict[str, Move]
    axis: int | None = -1

    @property
    def constant(self) -> bool:
        """No other weight decides how far to move."""
        return not any(move.reads for move in self.moves.values())

    def place(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Where `like` is, as a translation of this shape from zero: its mean over all other axes."""
        return like.movedim(-1 if self.axis is None else self.axis, -1).reshape(-1, *shape).mean(dim=0)


@dataclass(frozen=True)
class Frame:
    """
    A space with a free basis.

    Args:
        group: The group that may act on it.
        copies: Number of independent elements (one per key-value head, or one).
        per_layer: Every layer has its own.
        carrier: The frame of permutations that moves the copies about, in the role `carried`.
        after: The frame that a canonical form fixes before this one, as only then it sees what this one turns.
        stacked: A stack of matrices turns with it and, on the other side, with another frame that has it too: no
            symmetry of tokens is represented in either.
        shift: The moves of a frame of translations.
    """

    group: Group
    copies: int = 1
    per_layer: bool = False
    carrier: str | None = None
    carried: str = "key_value"
    after: str | None = None
    stacked: bool = False
    shift: Shift | None = field(default=None, compare=False)

    @property
    def represents(self) -> Literal["permutations", "matrices"] | None:
        """The representation that a symmetry of tokens may have in it, as of [`Group`]."""
        return None if self.stacked else self.group.represents


@dataclass(frozen=True)
class Turn:
    """
    One frame that an axis turns with.

    Args:
        frame: Kind of the frame.
        role: The axis's representation in it.
        step: The layer meant, counted from the parameter's own; outside the layers, from after the last.
        stacked: The parameter is a stack of square matrices, whose second axis this is; the axis counts in each.
    """

    frame: str
    role: str = "vector"
    step: int = 0
    stacked: bool = False


Axis = tuple[Turn, ...]


class Turned(NamedTuple):
    """
    One axis of one parameter with one frame that it turns with; `flat`: all axes of the tensor together; `stacked`:
    see [`Turn`].
    """

    dim: int
    key: FrameKey
    role: str
    flat: bool
    stacked: bool = False

    def unfold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The axis first and everything else after it: `[length, rest]`."""
        if self.stacked:
            return _transposed_blocks(tensor)
        front = tensor.flatten() if self.flat else tensor.movedim(self.dim, 0)
        return front.reshape(len(front), -1)

    def fold(self, front: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A tensor of this shape again."""
        if self.stacked:
            return _transposed_blocks(front)
        if self.flat:
            return front.reshape(shape)
        return front.reshape(shape[self.dim], *shape[: self.dim], *shape[self.dim + 1 :]).movedim(0, self.dim)


class Table:
    """
    The table of frames of one configuration, as `rigpt_hf/frames.py` writes it down.

    Attributes:
        kinds (`Mapping[str, Frame]`): the frames by kind, in the order in which they act on an axis; where those of
            layers differ, that of the layer with most kinds, if it has it.
        frames (`Mapping[FrameKey, Frame]`): the same, those that every layer has of its own once per layer.
        shifts (`Mapping[FrameKey, Shift]`): what the translations among them move.
        streams (`tuple[FrameKey, ...]`): the frames of the residual stream, one of each layer with local frames.
        transports (`tuple[str, ...]`): the parameters from one of those to another, from the first to the last.
        names (`tuple[str, ...]`): every parameter that the table knows, whether or not the configuration has it.
    """

    def __init__(
        self,
        kinds: Mapping[str, Frame],
        rows: Mapping[str, tuple[Axis, ...]],
        layers: Sequence[Mapping[str, Frame]],
    ):
        self._layers, self._rows = len(layers), rows
        self._turns: dict[str, tuple[Turned, ...]] = {}
        self.kinds = kinds
        self.frames: Mapping[FrameKey, Frame] = {
            FrameKey(kind, layer): frames[kind]
            for kind, frame in self.kinds.items()
            for layer, frames in (enumerate(layers) if frame.per_layer else [(None, kinds)])
            if kind in frames
        }
        self.streams = tuple(key for key in self.frames if key.kind in STREAMS)
        self.names = tuple(self._expand(self._rows))
        ends = {name: [turned.key for turned in self.turns(name)] for name in self.names}
        self.transports = tuple(
            name for name, keys in ends.items() if len(set(keys)) == len(keys) == 2 and set(keys) <= set(self.streams)
        )
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
                Turned(dim, self._key(turn, layer), turn.role, len(entry) == 1, turn.stacked)
                for dim, axis in enumerate(entry)
                for turn in axis
            )
        return self._turns[name]

    def rank(self, name: str) -> int:
        """The number of axes of a parameter that the table tells apart; 1 if they run together."""
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
        How a parameter meets the frames of one kind: it `"writes"` into them with its first axis, along which a stack
        lies, `"reads"` them with its last, or its `"rows"` are vectors of them; `None` if it does not carry them.
        """
        turns = self.turns(name)
        carried = [turned for turned in turns if turned.key.kind == kind]
        if not carried:
            return None
        if any(turned.dim == 0 or turned.stacked for turned in carried):
            return "writes"
        table_of_rows = all(turned.dim and turned.role not in READING for turned in turns)
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
        return {key: tuple(carriers) for key, carriers in index.items()}

    def row(self, name: str) -> tuple[Axis, ...]:
        """
        A parameter's row as it is written: one entry per axis, or one for all of them together.

        Raises:
            ValueError: if the table has no such parameter. A parameter that nobody said how to turn must not be
                guessed.
        """
        pattern = pattern_of(name)
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
        """A shift with the names of one layer, or, where all layers share the frame, of every layer."""
        moves = {}
        for index in range(self._layers) if layer is None else [layer]:
            for pattern, move in shift.moves.items():
                reads = tuple(_at(name, index) for name in move.reads)
                moves[_at(pattern, index)] = Move(move.change, reads)
        return replace(shift, like=_at(shift.like, layer or 0), moves=moves)


def _transposed_blocks(stack: torch.Tensor) -> torch.Tensor:
    """The transposes of the matrices `[n, n]` in a stack `[copies · n, n]`."""
    size = stack.shape[1]
    return stack.reshape(-1, size, size).mT.reshape(-1, size)


def layer_of(name: str) -> int | None:
    """The number of a parameter's layer, `None` outside the layers."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else None


def pattern_of(name: str) -> str:
    """A parameter's name with `*` for the number of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def _at(pattern: str, layer: int) -> str:
    return pattern.replace("*", str(layer))
