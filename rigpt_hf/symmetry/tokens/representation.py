"""How a model carries a symmetry of its tokens: by a gauge transformation for each generator, which leave it alone."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from ...checkpoints.folder import check_no_link, new_file, write_text
from ...checkpoints.read import in_words, load_config
from ...checkpoints.source import read_json
from ...checkpoints.written import look
from ...configuration_rigpt import RiGPTConfig
from ...frames import is_token_table, table_of
from ...token_symmetry_rigpt import FRAME_SHA256, SYMMETRY_FRAME, is_frame_of, symmetry_frame
from ..action import GaugeTransformation
from .filling import RESTING, Filling, choose_filling
from .isotypic import Axis, Decomposition
from .symmetry import TokenSymmetry


# The drift from a symmetry that 10,000 steps of training in float32 may leave, relative to the norm of the weights.
TRAINED = 1e-4


class Representation:
    """
    A symmetry of tokens as gauge transformations: generator `s` relabels tokens by `π(s)` and acts by `ρ(s)`.

    Both act on different axes and commute. A model has the symmetry in this representation if `π(s) ρ(s) θ = θ`.

    A representation belongs to a frame: after a gauge transformation `h` of the model it is `h ρ h⁻¹`. So that its
    irreducible parts stay known, `ρ` is kept as it was made, and `h` beside it.

    Args:
        symmetry (`TokenSymmetry`): `π`.
        transformations (`Sequence[GaugeTransformation]`): `ρ` of the generators, in their order.
        frame (`GaugeTransformation`, *optional*): `h`.

    Raises:
        ValueError: if their number, or the vocabulary, is another, or they do not keep lengths.
    """

    def __init__(
        self,
        symmetry: TokenSymmetry,
        transformations: Sequence[GaugeTransformation],
        frame: GaugeTransformation | None = None,
    ):
        self.symmetry, self.transformations, self.frame = symmetry, tuple(transformations), frame
        if not symmetry.generators:
            raise ValueError("`symmetry` must have generators, got one without. Give at least one.")
        if len(self.transformations) != len(symmetry.generators):
            raise ValueError(
                f"`transformations` must be one for each of the {len(symmetry.generators)} generators, got "
                f"{len(self.transformations)}."
            )
        self.config: RiGPTConfig = self.transformations[0].config
        symmetry.check_vocabulary(self.config)
        self.table = table_of(self.config)
        self.filling: Filling | None = None
        self._axes: dict[tuple, Axis | None] = {}
        self._named: dict[tuple, list[Axis | None]] = {}

    @cached_property
    def decomposition(self) -> Decomposition:
        """The irreducible representations."""
        return Decomposition(self.symmetry.group, self._orbits())

    def _orbits(self) -> list[np.ndarray]:
        points = self.symmetry.points
        rows = [np.searchsorted(points, orbit) for orbit in self.symmetry.orbits]
        return [np.searchsorted(row, self.symmetry.group.generators[:, row]) for row in rows]

    def conjugated(self, h: GaugeTransformation) -> "Representation":
        """The representation of a model after the gauge transformation `h`."""
        turned = Representation(self.symmetry, self.transformations, h if self.frame is None else h @ self.frame)
        turned.filling = self.filling
        return turned

    @property
    def turned(self) -> tuple[GaugeTransformation, ...]:
        """`h ρ h⁻¹` of the generators."""
        if self.frame is None:
            return self.transformations
        undo = self.frame.inverse()
        return tuple(self.frame @ one @ undo for one in self.transformations)

    def relabelled(self, number: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter after `π` of a generator: a token's row goes to the place of the token that it becomes."""
        return self.symmetry.relabelled(number, tensor) if is_token_table(name) else tensor

    def relabelled_state(self, number: int, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All parameters of a model after `π` of a generator."""
        return {name: self.relabelled(number, name, tensor) for name, tensor in weights.items()}

    def act(self, number: int, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All parameters of a model after `π ρ` of a generator."""
        return self.turned[number].state_dict(self.relabelled_state(number, weights))

    def axes(self, name: str, shape: Sequence[int]) -> list[Axis | None]:
        """How the group acts on the axes of a parameter, `None` where it does nothing; equal axes are one object."""
        key = name, tuple(shape)
        if key not in self._named:
            lengths = [int(np.prod(shape))] if self.table.rank(name) == 1 else list(shape)
            self._named[key] = [self._axis(name, dim, length) for dim, length in enumerate(lengths)]
        return self._named[key]

    def _axis(self, name: str, dim: int, length: int) -> Axis | None:
        turns = tuple((turned.key, turned.role) for turned in self.table.turns(name) if turned.dim == dim)
        names = [[str(key) for key, _ in turns if str(key) in one.elements] for one in self.transformations]
        tokens = dim == 0 and is_token_table(name)
        if not tokens and not any(names):
            return None
        # Layers whose elements are the same share their axes.
        digests = tuple(
            (one.elements[str(key)].numpy().tobytes() if str(key) in one.elements else b"", role)
            for key, role in turns
            for one in self.transformations
        )
        identity = (tokens, length, hash(digests))
        if identity not in self._axes:
            acts = [partial(self._act_on_axis, number, turns, tokens) for number in range(len(self.transformations))]
            self._axes[identity] = self.decomposition.axis(acts, length)
        return self._axes[identity]

    def _act_on_axis(self, number: int, turns: tuple, tokens: bool, front: torch.Tensor) -> torch.Tensor:
        if tokens:
            front = self.symmetry.relabelled(number, front)
        for key, role in turns:
            element = self.transformations[number].elements.get(str(key))
            if element is not None:
                front = self.table.frames[key].group.act(element, role, front)
        return front

    def project(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """
        The part of a parameter that has the symmetry, in the frame in which the representation was made.

        Args:
            name: The parameter's.
            tensor: The parameter, or, with more axes in front, several of which each turns as it does.
        """
        rank = self.table.rank(name)
        axes = self.axes(name, tensor.shape[-rank:] if rank > 1 else tensor.shape)
        if rank == 1:
            return self.decomposition.project(tensor.flatten(), axes).reshape(tensor.shape)
        return self.decomposition.project(tensor, axes)

    @torch.no_grad()
    def project_tensors_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Project parameters or gradients in place, in their own dtype; those that turn alike are done together."""
        alike: dict[tuple, list[str]] = {}
        for name, tensor in tensors.items():
            rank = self.table.rank(name)
            axes = tuple(map(id, self.axes(name, tensor.shape)))
            alike.setdefault((rank if rank > 1 else 0, tuple(tensor.shape), tensor.dtype, axes), []).append(name)
        for (rank, *_), names in alike.items():
            if not rank:
                for name in names:
                    tensors[name].copy_(self.project(name, tensors[name]))
                continue
            projected = self.project(names[0], torch.stack([tensors[name] for name in names]))
            for name, tensor in zip(names, projected, strict=True):
                tensors[name].copy_(tensor)

    def project_state(self, weights: Mapping[str, torch.Tensor], keep_norms: bool = False) -> dict[str, torch.Tensor]:
        """
        The nearest weights that have the symmetry: the mean of `π ρ` over the group, computed in float64.

        Args:
            weights: All parameters of a model.
            keep_norms: Give each parameter the norm that it had.
        """
        state = {name: tensor.detach().double() for name, tensor in weights.items()}
        if self.frame is not None:
            state = self.frame.inverse().state_dict(state)
        projected = {name: self.project(name, tensor) for name, tensor in state.items()}
        if keep_norms:
            for name, tensor in projected.items():
                if (length := tensor.norm()) > 0:
                    tensor *= state[name].norm() / length
        if self.frame is not None:
            projected = self.frame.state_dict(projected)
        return {name: tensor.to(weights[name].dtype) for name, tensor in projected.items()}

    def free_parameters(self, model: nn.Module) -> int:
        """How many numbers a model with this symmetry may choose."""
        total = 0
        for name, parameter in model.named_parameters():
            lengths = [parameter.numel()] if self.table.rank(name) == 1 else list(parameter.shape)
            total += self.decomposition.fixed(self.axes(name, parameter.shape), lengths)
        return total

    @torch.no_grad()
    def project_(self, model: nn.Module, keep_norms: bool = False) -> nn.Module:
        """[`project_state`] of a model in place."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.project_state(parameters, keep_norms).items():
            parameters[name].copy_(tensor)
        return model

    def distance(self, model: nn.Module) -> float:
        """How far weights are from having the symmetry, `|θ - Pθ| / |θ|`."""
        parameters = dict(model.named_parameters())
        return self.distance_of(parameters, parameters.__getitem__)

    @torch.no_grad()
    def distance_of(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> float:
        """[`distance`] of weights that `read` gives one after the other; copies of few are in memory at once."""
        home = None if self.frame is None else self.frame.inverse()

        def wide(name: str) -> torch.Tensor:
            return read(name).detach().double()

        def projected(name: str) -> torch.Tensor:
            return self.project(name, wide(name) if home is None else home.transform(name, wide(name), wide))

        away = norm = 0.0
        for name in names:
            nearest, tensor = projected(name), wide(name)
            if self.frame is not None:
                nearest = self.frame.transform(name, nearest, projected)
            away += float((tensor - nearest).square().sum())
            norm += float(tensor.square().sum())
        return (away / norm) ** 0.5 if norm else 0.0  # what is nothing has every symmetry

    @staticmethod
    def tolerance(dtype: torch.dtype) -> float:
        """The largest distance of weights that have a symmetry: that of rounding, or of long training in float32."""
        return max(TRAINED, torch.finfo(dtype).eps)

    @classmethod
    def trivial(cls, config: RiGPTConfig, symmetry: TokenSymmetry) -> "Representation":
        """The one in which nothing but tokens moves."""
        return cls.filled(config, symmetry, Filling((), (), {}))

    @classmethod
    def choose(
        cls,
        config: RiGPTConfig,
        symmetry: TokenSymmetry,
        *,
        kind: str = "irreducible",
        resting: float = RESTING,
        multiplicities: Mapping[str, Sequence[int]] | None = None,
    ) -> "Representation":
        """
        A representation that fills the frames of a configuration.

        Args:
            config: Of the model.
            symmetry: The exchanges of tokens.
            kind: `"irreducible"`: irreducible representations in the stream and the heads, in the shares in which
                functions on the group have them; `"permutation"`: coordinates change places as tokens do.
            resting: Share of each space in which the group does nothing.
            multiplicities: How often each irreducible (trivial first) is in a kind of frame, instead of that.

        Raises:
            ValueError: if what is asked does not fit.
        """
        _check_one_frame(config)
        plain = cls.trivial(config, symmetry)
        parts = plain.decomposition, plain._orbits()
        return cls.filled(
            config, symmetry, choose_filling(config, symmetry, *parts, kind, resting, multiplicities or {})
        )

    @classmethod
    def filled(cls, config: RiGPTConfig, symmetry: TokenSymmetry, filling: Filling) -> "Representation":
        """The representation that is made of these parts."""
        elements = filling.elements(config, len(symmetry.generators))
        made = cls(symmetry, [GaugeTransformation(config, one) for one in elements])
        made.filling = filling
        return made

    def to_config(self) -> dict[str, Any]:
        """
        The record for `token_symmetry` of a configuration, plain JSON; the frame by the name and hash of its file.

        Raises:
            ValueError: if the transformations were made by hand.
        """
        if self.filling is None:
            raise ValueError(
                "A representation must be made of parts to be recorded, got one of given transformations. Make it "
                "with `Representation.choose` or `Representation.filled`."
            )
        record = {"symmetry": self.symmetry.to_dict(), "filling": self.filling.to_dict(), "frame": None}
        if self.frame is None:
            return record
        return record | {"frame": SYMMETRY_FRAME, FRAME_SHA256: hashlib.sha256(self.frame.to_bytes()).hexdigest()}

    def save(self, folder: str | Path) -> None:
        """
        Record it in the folder of a saved model: in its `config.json`, with the frame beside it.

        Raises:
            ValueError: as [`to_config`], or if the folder has no `config.json` that can be read, or a link to one.
        """
        path, record = Path(folder) / "config.json", self.to_config()
        check_no_link(path, "folder")
        seen, frame = look(path), path.with_name(SYMMETRY_FRAME)
        content = read_json(path, "folder") | {"token_symmetry": record}
        with ExitStack() as both:
            if self.frame is not None:  # which has its name once the record is written
                temporary = both.enter_context(new_file(frame, "folder", seen=look(frame)))
                temporary.write_bytes(self.frame.to_bytes())
                temporary.chmod(path.stat().st_mode)
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            write_text(path, text, "folder", seen=seen, edits=True)

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> "Representation":
        """
        The representation that is recorded of a saved model; whether its weights have it, [`distance`] says.

        Args:
            source: Folder or Hub id.
            revision: Branch, tag or commit on the Hub.

        Raises:
            ValueError: if there is none, or its parts do not fit the configuration or cannot be read.
        """
        return cls.from_config(load_config(source, revision=revision), source, revision)

    @classmethod
    def from_config(
        cls, config: RiGPTConfig, source: str | Path | None = None, revision: str | None = None
    ) -> "Representation":
        """
        The representation that a configuration records; arguments and errors otherwise as of [`load`].

        Args:
            config: The configuration.
            source: Where the frame lies, if the record has one; where the model was loaded from if not given.
        """
        record, source = getattr(config, "token_symmetry", None), config.name_or_path if source is None else source
        if record is None:
            raise ValueError(
                f"`source` must have a `token_symmetry` in its config.json, got {str(source)!r} without. "
                "`Representation.save` records one."
            )
        _check_one_frame(config)
        try:
            symmetry, filling = TokenSymmetry.from_dict(record["symmetry"]), Filling.from_dict(record["filling"])
            if not len(symmetry.points):
                raise ValueError(
                    "`generators` must exchange some tokens, got none that do. Set `token_symmetry` to null"
                )
            filling.check(config, len(symmetry.generators))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"`token_symmetry` must be as `Representation.to_config` gives it for this configuration, got that of "
                f"{str(source)!r}: {in_words(error)}"
            ) from error
        made = cls.filled(config, symmetry, filling)
        if record["frame"] is None:
            return made
        place = symmetry_frame(source, revision)
        try:
            if place is None:
                raise ValueError(f"`{SYMMETRY_FRAME}` is not there.")
            frame = GaugeTransformation.load(place, config)
            if not is_frame_of(record, place):
                raise ValueError(f"`{SYMMETRY_FRAME}` is another one, by its SHA-256.")
            return made.conjugated(frame)
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(
                f"`source` must hold the frame that its `token_symmetry` names, got {str(source)!r}: "
                f"{in_words(error).rstrip('.')}. Restore {SYMMETRY_FRAME}, or set `token_symmetry` to null."
            ) from error


def _check_one_frame(config: RiGPTConfig) -> None:
    if config.post_norm:
        raise ValueError(
            "A symmetry turns the residual stream, got `post_norm=True`, whose gains lie in one frame of it. Train "
            "without."
        )
    if config.local_frames:
        raise ValueError(
            "A symmetry needs one frame for all layers, got `local_frames=True`, whose transports must stay "
            "orthogonal. Bring the model there with `to_global_frame`."
        )
