"""The experts of stock checkpoints: one file entry for each map of each, or one tensor for all, as RiGPT has them.

A layer of `E` experts with `F` neurons each, on a stream of `d`:

    in the library      experts.gate_up_proj [E, 2F, d]           experts.down_proj [E, d, F]
    their biases        experts.gate_up_proj_bias [E, 2F]         experts.down_proj_bias [E, d]
    on the Hub          experts.{e}.w1, w3 [F, d], or             experts.{e}.w2 [d, F], or
                        gate_proj, up_proj                        down_proj
    in RiGPT            experts.gate_proj, up_proj [E·F, d]       experts.down_proj [d, E·F]
    their biases        [E·F]                                     experts.down_bias [d, E]

Some classes store maps transposed, and rows of gate and up by turns: see [`Layout`].
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.weights import Rows, Weights, check_finite
from ..checkpoints.write import Entry


# What single experts call their maps.
MAPS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Names of the tensors of all experts of a layer, and the parameters in them.
FUSED = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_bias",),
}
OLDER, NEWER = ".block_sparse_moe.", ".mlp."
OF_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight")
OF_ALL = re.compile(rf"(.*\.experts)\.({'|'.join(FUSED)})")


@dataclass(frozen=True)
class Layout:
    """
    How a class stores the maps of all experts of a layer in one tensor.

    Args:
        transposed (`bool`, defaults to `False`): `[E, in, out]`, not `[E, out, in]`; biases are `[E, out]` anyway.
        alternating (`bool`, defaults to `False`): rows of gate and up by turns, not those of up behind those of gate.
    """

    transposed: bool = False
    alternating: bool = False

    def shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """RiGPT's parameters in a stock tensor, with their shapes; none where it is not that of all experts."""
        match = OF_ALL.fullmatch(name)
        if match is None or len(shape) != 3 - match[2].endswith("_bias"):
            return {}
        experts, rows, *columns = (shape[0], shape[2], shape[1]) if self._turns(shape) else shape
        rows //= len(FUSED[match[2]])
        shapes = {}
        for part in FUSED[match[2]]:
            beside = (rows, experts * (columns[0] if columns else 1))
            shapes[f"{match[1]}.{part}"] = beside if writes(part) else (experts * rows, *columns)
        return shapes

    def read(self, source: Weights, key: str, part: int, parts: int) -> torch.Tensor:
        """One of the maps in a stock tensor, or its biases as one column, `[E, out, in]`."""
        shape = source.shapes[key]
        if self.alternating:
            return self.maps(source.read(key), parts)[part]
        axis = 2 if self._turns(shape) else 1
        size = shape[axis] // parts
        stack = source._slice(key, axis, part * size, size)
        check_finite(key, stack, source.origin)
        return self.maps(stack, 1)[0]

    def maps(self, whole: torch.Tensor, parts: int) -> list[torch.Tensor]:
        """All maps in a stock tensor, or their biases as one column, each `[E, out, in]`."""
        whole = whole[..., None] if whole.dim() == 2 else whole.mT if self.transposed else whole
        if self.alternating:
            return list(whole.unflatten(1, (-1, parts)).unbind(2))
        return list(whole.chunk(parts, dim=1))

    def join(self, maps: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """A stock tensor of this shape from all maps in it, each `[E, out, in]`."""
        whole = torch.stack(maps, dim=2 if self.alternating else 1).flatten(1, 2)
        return (whole.mT if self._turns(shape) else whole).reshape(shape).contiguous()

    def _turns(self, shape: tuple[int, ...]) -> bool:
        return self.transposed and len(shape) == 3


def writes(name: str) -> bool:
    """Whether a parameter of experts writes into the stream: they lie beside each other in it, in others below."""
    return "down_" in name.rpartition(".experts.")[2]


class ExpertWeights(Weights):
    """
    The tensors of a source, those of experts put together as RiGPT has them; each is read when asked for.

    Args:
        source (`Weights`): the source's weights.
        count (`int`): experts of a layer, by its configuration.
        layout (`Layout`): how its class stores those of all experts of a layer.

    Raises:
        ValueError: if a layer lacks an expert, or has one too many.
    """

    def __init__(self, source: Weights, count: int, layout: Layout):
        self.source, self.origin, self.layout = source, source.origin, layout
        self.shapes, self.dtypes = {}, {}
        # For every name of ours those of the source, and of a tensor of all experts which part of how many it is.
        self.keys: dict[str, tuple[list[str], int, int]] = {}
        single: dict[str, dict[int, str]] = defaultdict(dict)
        for key, shape in source.shapes.items():
            name = key.replace(OLDER, NEWER)
            if match := OF_ONE.fullmatch(name):
                module, expert, kind = match.groups()
                single[f"{module}.{MAPS.get(kind, kind)}.weight"][int(expert)] = key
                continue
            parts = layout.shapes(name, shape)
            for part, (ours, own) in enumerate(parts.items()):
                self._add(ours, own, [key], part, len(parts))
            if not parts:
                self._add(name, shape, [key])
        for name, keys in single.items():
            if sorted(keys) != list(range(count)):
                raise ValueError(
                    f"`{name}` must be made of {count} experts by the configuration, got {len(keys)} in the source. "
                    "Check that the checkpoint is complete and that its configuration belongs to it."
                )
            rows, columns = source.shapes[keys[0]]
            shape = (rows, count * columns) if writes(name) else (count * rows, columns)
            self._add(name, shape, [keys[expert] for expert in range(count)])

    def _add(self, name: str, shape: tuple[int, ...], keys: list[str], part: int = 0, parts: int = 0) -> None:
        self.keys[name], self.shapes[name] = (keys, part, parts), shape
        self.dtypes[name] = self.source.dtypes[keys[0]]

    def read(self, name: str, rows: Rows | None = None, dim: int = 0) -> torch.Tensor:
        keys, part, parts = self.keys[name]
        if len(keys) == 1 and not parts:
            return self.source.read(keys[0], rows, dim)
        assert rows is None, name
        if not parts:
            return torch.cat([self.source.read(key) for key in keys], 1 if writes(name) else 0)
        stack = self.layout.read(self.source, keys[0], part, parts)
        return (stack.movedim(0, 1) if writes(name) else stack).reshape(self.shapes[name])

    def check_copy(self, copy: str, original: str) -> None:
        self.source.check_copy(self.keys[copy][0][0], self.keys[original][0][0])


def fused(name: str, shape: tuple[int, ...], parts: list[Entry], layout: Layout) -> Entry:
    """The recipe of a stock tensor of all experts of a layer from those of RiGPT's parameters in it."""

    def apart(part: Entry, dtype: torch.dtype) -> torch.Tensor:
        made = part.make(dtype)
        if writes(part.name):
            return made.unflatten(1, (shape[0], -1)).movedim(1, 0)
        return made.unflatten(0, (shape[0], -1)).reshape(shape[0], -1, *made.shape[1:] or (1,))

    return Entry(name, shape, lambda dtype: layout.join([apart(part, dtype) for part in parts], shape))


def experts_of(config: Any) -> int | None:
    """The number of experts of a stock configuration."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)


def with_experts(source: Weights, config: Any, layout: Layout) -> Weights:
    """The weights of a source, experts put together if its class has any."""
    count = experts_of(config)
    return source if count is None else ExpertWeights(source, count, layout)


def dense_layers(config: Any) -> list[int] | None:
    """The layers of a Qwen with experts that have none."""
    step, listed = config.decoder_sparse_step, config.mlp_only_layers or ()
    dense = [layer for layer in range(config.num_hidden_layers) if layer in listed or (layer + 1) % step]
    return dense or None


def no_experts(config: Any) -> str | None:
    """A class with experts of which a configuration has none."""
    return (
        None
        if experts_of(config)
        else "`num_experts` must be at least 1 to be converted, got 0. Use the class without experts."
    )


def jitter(config: Any) -> str | None:
    """Noise on what routers and experts read in training."""
    value = getattr(config, "router_jitter_noise", 0.0)
    if not value:
        return None
    return (
        f"`router_jitter_noise={value}` cannot be converted: it multiplies single coordinates of the stream by random "
        "numbers in training. Set it to 0 in the source's configuration; evaluation does not change."
    )
