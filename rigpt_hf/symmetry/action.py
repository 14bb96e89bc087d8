"""Gauge transformations: one matrix per frame, acting on models, state dicts and single tensors through the table."""

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from .frames import Axis, Frame, axes, frames, row
from .groups import Orthogonal


# Names that `frames=` accepts besides those of the table.
FRAME_GROUPS = {"head": ("head_qk", "head_vo")}


class GaugeTransformation:
    """
    A change of basis in some or all frames of a RiGPT, which leaves its function alone.

    Elements are stacks of matrices `[copies, n, n]` in float64, keyed by frame, `layers.{i}.` before those that every
    layer has of its own. Frames that are not listed stay as they are.

    Args:
        config (`RiGPTConfig`): The configuration of the models it acts on.
        elements (`Mapping[str, torch.Tensor]`): The matrices.

    Raises:
        ValueError: if an element belongs to no frame of `config` or has another shape than its frame.
    """

    def __init__(self, config: RiGPTConfig, elements: Mapping[str, torch.Tensor]):
        self.config = config
        self.elements = {key: element.to(torch.float64) for key, element in elements.items()}
        self._table = axes(config)
        known = _frame_keys(config)
        for key, element in self.elements.items():
            if key not in known:
                raise ValueError(
                    f"`elements` must be keyed by frames of the config, got {key!r}. It has {list(known)}."
                )
            shape = (known[key].copies, known[key].group.n, known[key].group.n)
            if tuple(element.shape) != shape:
                raise ValueError(f"`elements[{key!r}]` must have the shape {shape}, got {tuple(element.shape)}.")

    @classmethod
    def identity(cls, config: RiGPTConfig) -> "GaugeTransformation":
        """The transformation that changes nothing."""
        return cls(config, {})

    @classmethod
    def random(
        cls,
        config: RiGPTConfig,
        generator: torch.Generator | None = None,
        frames: Iterable[str] = ("stream", "head"),
        *,
        special: bool = False,
        fix_ones: bool = False,
    ) -> "GaugeTransformation":
        """
        A random transformation of the named frames.

        Args:
            config: The configuration of the models it acts on.
            generator: Source of randomness; the global one if absent.
            frames: Names from the table of frames, or `"head"` for both frames of the heads.
            special: Only elements that a path joins to the identity, as `at` needs.
            fix_ones: Only rotations of the stream that leave the vector of ones alone; for those a converted GPT-2 can
                be run by the stock class in its new frame.

        Raises:
            ValueError: if a name is unknown.
        """
        wanted = [name for group in frames for name in FRAME_GROUPS.get(group, (group,))]
        known = _frame_keys(config)
        kinds = {_kind(key) for key in known}
        for name in wanted:
            if name not in kinds:
                raise ValueError(
                    f"`frames` must name frames of this configuration, got {name!r}. It has "
                    f"{', '.join(sorted(kinds))}; 'head' means head_qk and head_vo."
                )
        elements = {}
        for key, frame in known.items():
            if _kind(key) not in wanted:
                continue
            if key == "stream" and fix_ones:
                elements[key] = _fixing_ones(frame.group.n, generator, special)[None]
            else:
                elements[key] = torch.stack([frame.group.random(generator, special) for _ in range(frame.copies)])
        return cls(config, elements)

    def inverse(self) -> "GaugeTransformation":
        """The transformation that undoes this one."""
        return GaugeTransformation(self.config, {key: torch.linalg.inv(m) for key, m in self.elements.items()})

    def __matmul__(self, other: "GaugeTransformation") -> "GaugeTransformation":
        """`(g @ h)(model) = g(h(model))`."""
        product = dict(other.elements)
        for key, matrix in self.elements.items():
            product[key] = matrix @ product[key] if key in product else matrix
        return GaugeTransformation(self.config, product)

    def at(self, t: float) -> "GaugeTransformation":
        """
        The point at `t` on the path from the identity (`t = 0`) to this transformation (`t = 1`); a geodesic for
        orthogonal frames.

        Raises:
            ValueError: if an element is not joined to the identity; draw with `special=True`.
        """
        known = _frame_keys(self.config)
        return GaugeTransformation(
            self.config,
            {key: torch.stack([known[key].group.path(m, t) for m in stack]) for key, stack in self.elements.items()},
        )

    def transform(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter `name` after the transformation: computed in float64, cast once to the dtype it had."""
        entry, layer = row(name, self._table)
        if len(entry) != tensor.dim():
            raise ValueError(f"`{name}` has {tensor.dim()} axes where the table of frames has {len(entry)}.")
        turned = tensor
        for dim, axis in enumerate(entry):
            matrices = self._matrices(axis, layer)
            if matrices is not None:
                turned = _act(turned.to(torch.float64), dim, matrices.to(tensor.device))
        return turned.to(tensor.dtype)

    def state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A transformed copy of a state dict; tensors that do not turn are the same objects."""
        return {name: self.transform(name, tensor) for name, tensor in state_dict.items()}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Transform a model in place. Tied parameters turn once."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.transform(name, parameter))
        return model

    def __call__(self, model: nn.Module) -> nn.Module:
        """A transformed copy of a model."""
        return self.apply_(copy.deepcopy(model))

    def _matrices(self, axis: Axis | None, layer: str) -> torch.Tensor | None:
        if axis is None:
            return None
        matrices = self.elements.get(axis.frame, self.elements.get(layer + axis.frame))
        if matrices is None or not axis.covector:
            return matrices
        return torch.linalg.inv(matrices).mT


@torch.no_grad()
def gauge_error(model: nn.Module, g: GaugeTransformation, input_ids: torch.Tensor) -> float:
    """
    How much of the function a transformation changes: `max |Δlogit| / max |logit|` on `input_ids` `[B, S]`.

    Zero up to rounding for every gauge transformation of a RiGPT; of order one for a model with a preferred basis.
    """
    model = model.eval()
    before = model(input_ids, use_cache=False).logits
    after = g(model)(input_ids, use_cache=False).logits
    return ((after - before).abs().max() / before.abs().max()).item()


def _act(tensor: torch.Tensor, dim: int, matrices: torch.Tensor) -> torch.Tensor:
    """Multiply axis `dim`, of length copies · repeats · n, by `matrices` `[copies, n, n]`; repeats share a matrix."""
    copies, n, _ = matrices.shape
    moved = tensor.movedim(dim, 0)
    blocks = moved.reshape(copies, -1, n, math.prod(moved.shape[1:]))
    return (matrices[:, None] @ blocks).reshape(moved.shape).movedim(0, dim)


def _frame_keys(config: RiGPTConfig) -> dict[str, Frame]:
    """All frames of a configuration, those that every layer has of its own once per layer."""
    keys = {}
    for name, frame in frames(config).items():
        prefixes = [f"layers.{index}." for index in range(config.num_hidden_layers)] if frame.per_layer else [""]
        keys.update({prefix + name: frame for prefix in prefixes})
    return keys


def _kind(key: str) -> str:
    return key.rsplit(".", 1)[-1]


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
    inner[1:, 1:] = Orthogonal(n - 1).random(generator, special)
    return swap @ inner @ swap
