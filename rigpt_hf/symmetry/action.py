"""Gauge transformations: one element per frame, acting on models, state dicts and single tensors through the table."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from ..checkpoints.folder import named_file
from ..configuration_rigpt import RiGPTConfig
from ..frames import Frame, FrameKey, table_of
from ..groups import Role, orthogonal
from ..table import Move, Read, Turned


class GaugeTransformation:
    """
    A change of basis in some or all frames of a RiGPT, which leaves its function alone.

    Elements are stacks, one entry per copy of the frame, in the form its group defines (matrices `[copies, n, n]` for
    most), keyed by frame, `layers.{i}.` before those that every layer has of its own. Frames that are not listed rest.
    Translations act first, then matrices, then permutations.

    Args:
        config (`RiGPTConfig`): The configuration of the models it acts on.
        elements (`Mapping[str, torch.Tensor]`): The elements.

    Raises:
        ValueError: if an element belongs to no frame of `config` or has another shape than its frame.
    """

    def __init__(self, config: RiGPTConfig, elements: Mapping[str, torch.Tensor] | Mapping[FrameKey, torch.Tensor]):
        self.config = config
        self.table = table_of(config)
        self.elements: dict[str, torch.Tensor] = {}
        for name, element in elements.items():
            frame = self.table.frames.get(FrameKey.parse(str(name)))
            if frame is None:
                raise ValueError(
                    f"`elements` must be keyed by frames of the config, got {str(name)!r}. It has "
                    f"{', '.join(sorted(self.table.kinds))}, with `layers.0.` and so on in front where every layer "
                    "has its own."
                )
            shape = frame.group.shape(frame.copies)
            if tuple(element.shape) != shape:
                raise ValueError(f"`elements[{str(name)!r}]` must have the shape {shape}, got {tuple(element.shape)}.")
            self.elements[str(name)] = element.to(frame.group.dtype)

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
        wanted = resolve_frames(config, frames)
        elements = {}
        for key, frame in table_of(config).frames.items():
            if key.kind not in wanted:
                continue
            if key.kind == "stream" and fix_ones:
                elements[key] = _fixing_ones(config.hidden_size, generator, special)[None]
            else:
                elements[key] = frame.group.random(frame.copies, generator, special, compact)
        return cls(config, elements)

    def inverse(self) -> "GaugeTransformation":
        """The transformation that undoes this one."""
        linear = self.linear()
        elements = {}
        for key, frame, element in self.items():
            if frame.shift is not None:
                elements[key] = -linear._carry(key, element)
            else:
                elements[key] = self._reordered(key, frame.group.inverse(element))
        return GaugeTransformation(self.config, elements)

    def __matmul__(self, other: "GaugeTransformation") -> "GaugeTransformation":
        """
        `(g @ h)(model) = g(h(model))`.

        Permutations of heads act last, so what `g` does in a head, `g @ h` does in the head that `h` takes it from;
        and a translation of `g` is seen from the frame before `h`.
        """
        self._check_frames(other.config)
        undone = other.linear().inverse()
        product = {key: element for key, _, element in other.items()}
        for key, frame, element in self.items():
            if frame.shift is not None:
                element = undone._carry(key, element)
            else:
                element = other._reordered(key, element, back=True)
            product[key] = frame.group.product(element, product[key]) if key in product else element
        return GaugeTransformation(self.config, product)

    def at(self, t: float) -> "GaugeTransformation":
        """
        The point at `t` on the path from the identity (`t = 0`) to this transformation (`t = 1`); a geodesic for
        orthogonal frames.

        Raises:
            ValueError: if an element is not joined to the identity; draw with `special=True`.
        """
        elements = {key: frame.group.path(element, t) for key, frame, element in self.items()}
        return GaugeTransformation(self.config, elements)

    def transform(
        self, name: str, tensor: torch.Tensor, read: Read | None = None, algebra: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """
        The parameter `name` after the transformation: computed in `algebra`, cast once to the dtype it had.

        Args:
            name: The parameter's name.
            tensor: Its value.
            read: Gives other parameters of the same model, as they were before; only translations need it.
            algebra: float64, unless the result is no more than a guess.

        Raises:
            ValueError: if the table has no such parameter, or a translation needs `read`.
        """
        rank = self.table.rank(name)
        if rank not in (1, tensor.dim()):
            raise ValueError(f"`{name}` has {tensor.dim()} axes where the table of frames has {rank}.")
        moved = self._translate(name, tensor, read)
        for turned in self.table.turns(name):
            element = self.elements.get(str(turned.key))
            if element is not None:
                front = turned.unfold(moved.to(algebra))
                acted = self.table.frames[turned.key].group.act(element, turned.role, front)
                moved = turned.fold(acted, tensor.shape)
        return tensor if moved is tensor else moved.reshape(tensor.shape).to(tensor.dtype)

    def turn_axis(self, name: str, dim: int, tensor: torch.Tensor, at: int = 0) -> torch.Tensor:
        """A tensor whose axis `at` is like the axis `dim` of the parameter `name`; translations have no part in it."""
        for turned in self.table.turns(name):
            element = self.elements.get(str(turned.key))
            if element is not None and turned.dim == dim:
                place = Turned(at, turned.key, turned.role, flat=False)
                acted = self.table.frames[turned.key].group.act(element, turned.role, place.unfold(tensor))
                tensor = place.fold(acted, tensor.shape)
        return tensor

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

        The record of a token symmetry is of the frame before, so `config.token_symmetry` becomes `None`;
        `Representation.conjugated` gives the representation after, and `Representation.save` records it.

        Raises:
            ValueError: if the model's frames are not those this transformation was made for.
        """
        self._check_frames(model.config)
        parameters = dict(model.named_parameters())
        # Translations read parameters as they were, so they come first.
        translated = {name: self.transform(name, parameters[name], parameters.get) for name in self.reads(parameters)}
        for name, parameter in parameters.items():
            parameter.copy_(translated[name] if name in translated else self.transform(name, parameter))
        if self.elements:
            model.config.token_symmetry = None
        return model

    def __call__(self, model: nn.Module) -> nn.Module:
        """A transformed copy of a model."""
        return self.apply_(copy.deepcopy(model))

    def _check_frames(self, config: RiGPTConfig) -> None:
        ours, theirs = self.table.frames, table_of(config).frames
        if theirs == ours:
            return
        key = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
        here, there = (str(frames[key].group) if key in frames else "none" for frames in (ours, theirs))
        raise ValueError(
            f"`config` must have the frames that this transformation was made for, got {there} in the frame "
            f"{str(key)!r}, where it has {here}. Make the transformation from the model's own config."
        )

    def reads(self, names: Iterable[str]) -> list[str]:
        """The named parameters whose new value depends on other parameters."""
        return [name for name in names if any(move.reads for _, move in self._moves(name))]

    def save(self, path: str | Path) -> None:
        """Write the elements as safetensors; a `ValueError` if what is at `path` is not this program's."""
        with named_file(Path(path)) as place:
            place.write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file that [`save`] writes."""
        return save({key: element.contiguous() for key, element in self.elements.items()})

    @classmethod
    def load(cls, path: str | Path, config: RiGPTConfig) -> "GaugeTransformation":
        """Read what [`save`] wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  no mapping

    def items(self) -> Iterator[tuple[FrameKey, Frame, torch.Tensor]]:
        """The elements with their frames."""
        for name, element in self.elements.items():
            key = FrameKey.parse(name)
            yield key, self.table.frames[key], element

    def linear(self) -> "GaugeTransformation":
        """The same without translations."""
        chosen = {key: element for key, frame, element in self.items() if frame.shift is None}
        return GaugeTransformation(self.config, chosen)

    def _reordered(self, key: FrameKey, element: torch.Tensor, back: bool = False) -> torch.Tensor:
        """An element of a frame whose copies are taken from where this permutes heads, or brought `back` there."""
        frame = self.table.frames[key]
        exchange = FrameKey(frame.carrier or "", key.layer)
        permutation = self.elements.get(str(exchange))
        if permutation is None:
            return element

        def order(role: Role) -> torch.Tensor:
            heads = self.table.frames[exchange].group.order_of_copies(permutation, role)
            return heads.argsort() if back else heads

        return frame.group.reordered(element, order, frame.carried)

    def _carry(self, key: FrameKey, vectors: torch.Tensor) -> torch.Tensor:
        """A translation's vectors `[copies, n]` as they are after this (linear) transformation."""
        name, axis = self.table.shifts[key].like, self.table.shifts[key].axis
        if axis is None:
            return vectors
        return self.turn_axis(name, axis % self.table.rank(name), vectors.flatten()).reshape(vectors.shape)

    def _moves(self, name: str) -> list[tuple[FrameKey, Move]]:
        """The translations that change a parameter."""
        return [(key, move) for key, move in self.table.moved(name) if str(key) in self.elements]

    def _translate(self, name: str, tensor: torch.Tensor, read: Read | None) -> torch.Tensor:
        def read_here(other: str) -> torch.Tensor:
            if read is None:
                raise ValueError(f"`read` must give the other parameters to translate `{name}`, got none.")
            return read(other).to(torch.float64)

        for key, move in self._moves(name):
            vector = self.elements[str(key)].flatten().to(tensor.device)
            tensor = tensor.to(torch.float64) + move(vector, read_here)
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
    known = table_of(config).kinds
    several = {
        "all": list(known),
        "head": [kind for kind in known if kind.startswith("head_")],
        "shifts": [kind for kind, frame in known.items() if frame.shift is not None],
    }
    resolved: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in known and name not in several:
            raise ValueError(
                f"`frames` must name frames of this configuration, got {name!r}. It has "
                f"{', '.join(sorted(known))}; 'head' means head_qk and head_vo, 'all' means all."
            )
        resolved += [member for member in several.get(name, [name]) if member not in resolved]
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
