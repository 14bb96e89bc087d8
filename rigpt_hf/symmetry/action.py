"""Gauge transformations: one element per frame, acting on models, state dicts and single tensors through the table."""

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from .frames import (
    Frame,
    Read,
    Turn,
    axes,
    frame_keys,
    frames,
    in_layer,
    key_of,
    kind_of,
    layer_of,
    pattern_of,
    prefix_of,
    row,
    shifts,
)
from .groups import orthogonal
from .permutations import HeadPermutations, Translations


# Names that `frames=` accepts besides those of the table.
FRAME_GROUPS = {"head": ("head_qk", "head_vo"), "shifts": ("key_shift", "value_shift", "position_shift")}


class GaugeTransformation:
    """
    A change of basis in some or all frames of a RiGPT, which leaves its function alone.

    Elements are stacks, one entry per copy of the frame, in the form its group defines (matrices `[copies, n, n]` for
    most), keyed by frame, `layers.{i}.` before those that every layer has of its own. Frames that are not listed stay
    as they are. Translations act first, then matrices, then permutations.

    Args:
        config (`RiGPTConfig`): The configuration of the models it acts on.
        elements (`Mapping[str, torch.Tensor]`): The elements.

    Raises:
        ValueError: if an element belongs to no frame of `config` or has another shape than its frame.
    """

    def __init__(self, config: RiGPTConfig, elements: Mapping[str, torch.Tensor]):
        self.config = config
        self.frames = frame_keys(config)
        self.elements: dict[str, torch.Tensor] = {}
        self._table, self._shifts = axes(config), shifts(config)
        for key, element in elements.items():
            if key not in self.frames:
                raise ValueError(
                    f"`elements` must be keyed by frames of the config, got {key!r}. It has "
                    f"{', '.join(sorted({kind_of(known) for known in self.frames}))}, behind `layers.0.` and so on "
                    "where every layer has its own."
                )
            group, copies = self.frames[key].group, self.frames[key].copies
            if tuple(element.shape) != group.shape(copies):
                raise ValueError(
                    f"`elements[{key!r}]` must have the shape {group.shape(copies)}, got {tuple(element.shape)}."
                )
            self.elements[key] = element.to(torch.int64 if isinstance(group, HeadPermutations) else torch.float64)

    @classmethod
    def identity(cls, config: RiGPTConfig) -> "GaugeTransformation":
        """The transformation that changes nothing."""
        return cls(config, {})

    @classmethod
    def random(
        cls,
        config: RiGPTConfig,
        generator: torch.Generator | None = None,
        frames: Iterable[str] | str = ("stream", "head"),
        *,
        special: bool = False,
        compact: bool = False,
        fix_ones: bool = False,
    ) -> "GaugeTransformation":
        """
        A random transformation of the named frames.

        Args:
            config: The configuration of the models it acts on.
            generator: Source of randomness; the global one if absent.
            frames: Names from the table of frames, `"head"` for the spaces of the heads, `"shifts"` for all
                translations, or `"all"` for the whole group.
            special: Only elements that a path joins to the identity, as `at` needs.
            compact: Only elements that keep all lengths: rotations, reflections, exchanges and signs.
            fix_ones: Only rotations of the stream that leave the vector of ones alone; for those a converted GPT-2 can
                be run by the stock class in its new frame.

        Raises:
            ValueError: if a name is unknown.
        """
        known = frame_keys(config)
        wanted = resolve_frames(config, frames)
        elements = {}
        for key, frame in known.items():
            if kind_of(key) not in wanted:
                continue
            if key == "stream" and fix_ones:
                elements[key] = _fixing_ones(config.hidden_size, generator, special)[None]
            else:
                elements[key] = frame.group.random(frame.copies, generator, special, compact)
        return cls(config, elements)

    def inverse(self) -> "GaugeTransformation":
        """The transformation that undoes this one."""
        linear = self._only(translations=False)
        elements = {}
        for key, element in self.elements.items():
            group = self.frames[key].group
            if isinstance(group, Translations):
                elements[key] = -linear._carry(key, element)
            else:
                inverse, order = group.inverse(element), self._carrier(key)
                elements[key] = inverse if order is None else inverse[order]
        return GaugeTransformation(self.config, elements)

    def __matmul__(self, other: "GaugeTransformation") -> "GaugeTransformation":
        """
        `(g @ h)(model) = g(h(model))`.

        Permutations of heads act last, so what `g` does in a head, `g @ h` does in the head that `h` takes it from;
        and a translation of `g` is seen from the frame before `h`.
        """
        self._check_frames(other.config)
        undone = other._only(translations=False).inverse()
        product = dict(other.elements)
        for key, element in self.elements.items():
            group = self.frames[key].group
            if isinstance(group, Translations):
                element = undone._carry(key, element)
            elif (order := other._carrier(key)) is not None:
                element = element[order.argsort()]
            product[key] = group.product(element, product[key]) if key in product else element
        return GaugeTransformation(self.config, product)

    def at(self, t: float) -> "GaugeTransformation":
        """
        The point at `t` on the path from the identity (`t = 0`) to this transformation (`t = 1`); a geodesic for
        orthogonal frames.

        Raises:
            ValueError: if an element is not joined to the identity; draw with `special=True`.
        """
        return GaugeTransformation(
            self.config, {key: self.frames[key].group.path(element, t) for key, element in self.elements.items()}
        )

    def transform(
        self, name: str, tensor: torch.Tensor, read: Read | None = None, algebra: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """
        The parameter `name` after the transformation: computed in `algebra`, cast once to the dtype it had.

        Args:
            name: Of the parameter.
            tensor: Its value.
            read: Gives other parameters of the same model, as they were before; only translations need it.
            algebra: float64, unless the result is no more than a guess.

        Raises:
            ValueError: if the table has no such parameter, or a translation needs `read`.
        """
        entry, layer = row(name, self._table)
        if len(entry) not in (1, tensor.dim()):
            raise ValueError(f"`{name}` has {tensor.dim()} axes where the table of frames has {len(entry)}.")
        moved = self._translate(name, tensor, read)
        for dim, axis in enumerate(entry):
            for turn in axis:
                if (key := self._key(turn, layer)) is not None:
                    whole = moved.to(algebra)
                    front = whole.flatten() if len(entry) == 1 else whole.movedim(dim, 0)
                    moved = self._act(key, turn, front.reshape(len(front), -1)).reshape(front.shape).movedim(0, dim)
        return tensor if moved is tensor else moved.reshape(tensor.shape).to(tensor.dtype)

    def state_dict(
        self, state_dict: Mapping[str, torch.Tensor], algebra: torch.dtype = torch.float64
    ) -> dict[str, torch.Tensor]:
        """A transformed copy of a state dict; tensors that do not turn are the same objects."""
        read = state_dict.__getitem__
        return {name: self.transform(name, tensor, read, algebra) for name, tensor in state_dict.items()}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """
        Transform a model in place. Tied parameters turn once.

        Raises:
            ValueError: if the model's frames are not those this transformation was made for.
        """
        self._check_frames(model.config)
        parameters = dict(model.named_parameters())
        # What is read by a translation changes after it.
        translated = {name: self.transform(name, parameters[name], parameters.get) for name in self.reads(parameters)}
        for name, parameter in parameters.items():
            parameter.copy_(translated[name] if name in translated else self.transform(name, parameter))
        return model

    def __call__(self, model: nn.Module) -> nn.Module:
        """A transformed copy of a model."""
        return self.apply_(copy.deepcopy(model))

    def _check_frames(self, config: RiGPTConfig) -> None:
        theirs = frame_keys(config)
        if theirs == self.frames:
            return
        key = next(key for key in (*self.frames, *theirs) if self.frames.get(key) != theirs.get(key))
        here, there = (str(table[key].group) if key in table else "none" for table in (self.frames, theirs))
        raise ValueError(
            f"`config` must have the frames that this transformation was made for, got {there} in the frame {key!r}, "
            f"where it has {here}. Make the transformation from the model's own config."
        )

    def reads(self, names: Iterable[str]) -> list[str]:
        """Those of the named parameters whose new value depends on other parameters."""
        return [name for name in names if any(self._reads_others(key, name) for key in self._moves(name))]

    def _reads_others(self, key: str, name: str) -> bool:
        """Whether a translation needs other parameters to know how far to move this one."""
        asked = []

        def read(pattern: str) -> torch.Tensor:
            asked.append(pattern)
            raise LookupError(pattern)

        with suppress(LookupError):
            self._shifts[kind_of(key)].moves[pattern_of(name)](self.elements[key].flatten(), read)
        return bool(asked)

    def save(self, path: str | Path) -> None:
        """Write the elements to a safetensors file."""
        save_file({key: element.contiguous() for key, element in self.elements.items()}, path)

    @classmethod
    def load(cls, path: str | Path, config: RiGPTConfig) -> "GaugeTransformation":
        """Read what [`save`] wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  no mapping

    def _key(self, turn: Turn, layer: str) -> str | None:
        """The key of the element behind a turn, if there is one."""
        key = key_of(turn, layer, self.frames)
        return key if key in self.elements else None

    def _only(self, translations: bool) -> "GaugeTransformation":
        chosen = {
            key: element
            for key, element in self.elements.items()
            if isinstance(self.frames[key].group, Translations) == translations
        }
        return GaugeTransformation(self.config, chosen)

    def _carrier(self, key: str) -> torch.Tensor | None:
        """Where the copies of a frame are taken from when this permutes heads."""
        frame: Frame = self.frames[key]
        carrier = prefix_of(key) + (frame.carrier or "")
        if frame.carrier is None or carrier not in self.elements:
            return None
        group = self.frames[carrier].group
        assert isinstance(group, HeadPermutations)
        return group.key_value(self.elements[carrier])

    def _carry(self, key: str, vectors: torch.Tensor) -> torch.Tensor:
        """A translation's vectors `[copies, n]` as they are after this (linear) transformation."""
        name = in_layer(self._shifts[kind_of(key)].like, prefix_of(key))
        entry, layer = row(name, self._table)
        moved = vectors.reshape(-1, 1)
        for turn in entry[-1]:
            if (element := self._key(turn, layer)) is not None:
                moved = self._act(element, turn, moved)
        return moved.reshape(vectors.shape)

    def _act(self, key: str, turn: Turn, tensor: torch.Tensor) -> torch.Tensor:
        group = self.frames[key].group
        assert not isinstance(group, Translations), "translations turn no axis"
        return group.act(self.elements[key], turn.role, tensor)

    def _moves(self, name: str) -> list[str]:
        """Keys of the translations that change a parameter."""
        pattern, layer = pattern_of(name), layer_of(name)
        keys = [key for kind, shift in self._shifts.items() if pattern in shift.moves for key in (layer + kind, kind)]
        return [key for key in dict.fromkeys(keys) if key in self.elements]

    def _translate(self, name: str, tensor: torch.Tensor, read: Read | None) -> torch.Tensor:
        def read_here(pattern: str) -> torch.Tensor:
            if read is None:
                raise ValueError(f"`read` must give the other parameters to translate `{name}`, got none.")
            return read(in_layer(pattern, layer_of(name))).to(torch.float64)

        for key in self._moves(name):
            vector = self.elements[key].flatten().to(tensor.device)
            change = self._shifts[kind_of(key)].moves[pattern_of(name)](vector, read_here)
            tensor = tensor.to(torch.float64) + change
        return tensor


@torch.no_grad()
def gauge_error(model: nn.Module, g: GaugeTransformation, input_ids: torch.Tensor) -> float:
    """
    How much of the function a transformation changes: `max |Δlogit| / max |logit|` on `input_ids` `[B, S]`.

    Zero up to rounding for every gauge transformation of a RiGPT; of order one for a model with a preferred basis.
    """
    plain, turned = copy.deepcopy(model).eval(), g(model).eval()
    before = plain(input_ids, use_cache=False).logits
    after = turned(input_ids, use_cache=False).logits
    return ((after - before).abs().max() / before.abs().max()).item()


def resolve_frames(config: RiGPTConfig, names: Iterable[str] | str) -> list[str]:
    """
    The frames that are meant by names from the table, `"head"`, `"shifts"` or `"all"`.

    Raises:
        ValueError: if a name is unknown.
    """
    known = frames(config)
    resolved: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        members = tuple(known) if name == "all" else FRAME_GROUPS.get(name, (name,))
        if name not in known and name != "all" and name not in FRAME_GROUPS:
            raise ValueError(
                f"`frames` must name frames of this configuration, got {name!r}. It has "
                f"{', '.join(sorted(known))}; 'head' means head_qk and head_vo, 'all' means all."
            )
        resolved += [member for member in members if member in known and member not in resolved]
    return resolved


def _fixing_ones(n: int, generator: torch.Generator | None, special: bool) -> torch.Tensor:
    """A uniform rotation among those that leave the vector of ones alone."""
    normal = torch.zeros(n, dtype=torch.float64)
    normal[0] = 1.0
    normal = normal - n**-0.5
    length = normal.norm()
    if length == 0:
        return torch.eye(n, dtype=torch.float64)
    normal = normal / length
    # The reflection that exchanges the first axis and the direction of ones.
    swap = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(n - 1).random(1, generator, special)[0]
    return swap @ inner @ swap
