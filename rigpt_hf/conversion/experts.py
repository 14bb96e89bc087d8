"""The experts of stock checkpoints: one file entry for each map of each, or one tensor for all, as RiGPT has them.

A layer of `E` experts with `F` neurons each, on a stream of `d`:

    in the library      experts.gate_up_proj [E, 2F, d]           experts.down_proj [E, d, F]
    on the Hub          experts.{e}.w1, w3 [F, d], or             experts.{e}.w2 [d, F], or
                        gate_proj, up_proj                        down_proj
    in RiGPT            experts.gate_proj, up_proj [E·F, d]       experts.down_proj [d, E·F]
"""

import re
from collections import defaultdict
from typing import Any

import torch

from ..checkpoints.weights import Rows, Weights, check_finite
from ..checkpoints.write import Entry


# What single experts call their maps.
MAPS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Names of the tensors of all experts of a layer, and the maps in them, one behind the other.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
OLDER, NEWER = ".block_sparse_moe.", ".mlp."
OF_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight")
OF_ALL = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


class ExpertWeights(Weights):
    """
    The tensors of a source, those of experts put together as RiGPT has them; each is read when asked for.

    Args:
        source (`Weights`): the source's weights.
        count (`int`): experts of a layer, by its configuration.

    Raises:
        ValueError: if a layer lacks an expert, or has one too many.
    """

    def __init__(self, source: Weights, count: int):
        self.source, self.origin = source, source.origin
        self.shapes, self.dtypes = {}, {}
        # For every name of ours the source's, with the part of a tensor that it is, one of `parts`.
        self.parts: dict[str, list[tuple[str, int, int]]] = {}
        single: dict[str, dict[int, str]] = defaultdict(dict)
        for key, shape in source.shapes.items():
            name = key.replace(OLDER, NEWER)
            if match := OF_ONE.fullmatch(name):
                module, expert, kind = match.groups()
                single[f"{module}.{MAPS.get(kind, kind)}.weight"][int(expert)] = key
            elif (match := OF_ALL.fullmatch(name)) and len(shape) == 3:
                module, fused = match.groups()
                for part, kind in enumerate(FUSED[fused]):
                    rows = shape[1] // len(FUSED[fused])
                    self._add(f"{module}.{kind}.weight", [(key, part * rows, rows)], shape[0], (rows, shape[2]))
            else:
                self._add(name, [(key, 0, 0)], 1, shape)
        for name, keys in single.items():
            if sorted(keys) != list(range(count)):
                raise ValueError(
                    f"`{name}` must be made of {count} experts by the configuration, got {len(keys)} in the source. "
                    "Check that the checkpoint is complete and that its configuration belongs to it."
                )
            ordered = [(keys[expert], 0, 0) for expert in range(count)]
            self._add(name, ordered, count, source.shapes[ordered[0][0]])

    def _add(self, name: str, parts: list[tuple[str, int, int]], experts: int, shape: tuple[int, ...]) -> None:
        key = parts[0][0]
        if ".experts." in name and len(shape) == 2:
            dim = 1 if name.endswith("down_proj.weight") else 0
            shape = tuple(size * (experts if axis == dim else 1) for axis, size in enumerate(shape))
        self.parts[name], self.shapes[name], self.dtypes[name] = parts, shape, self.source.dtypes[key]

    def read(self, name: str, rows: Rows | None = None, dim: int = 0) -> torch.Tensor:
        parts = self.parts[name]
        key, start, length = parts[0]
        if len(parts) == 1 and not length:
            return self.source.read(key, rows, dim)
        assert rows is None, name
        axis = 1 if name.endswith("down_proj.weight") else 0
        if not length:
            return torch.cat([self.source.read(one) for one, _, _ in parts], axis)
        stack = self.source._slice(key, 1, start, length)  # [E, F, d], or [E, d, F]
        check_finite(key, stack, self.origin)
        return stack.flatten(0, 1) if axis == 0 else stack.movedim(0, 1).flatten(1)

    def check_copy(self, copy: str, original: str) -> None:
        self.source.check_copy(self.parts[copy][0][0], self.parts[original][0][0])


def parts_of(name: str, tensor: torch.Tensor) -> list[tuple[str, str, str, tuple[int, int]]]:
    """The names, modules, kinds and shapes of the maps of ours in a tensor of the library's with all experts."""
    match = OF_ALL.fullmatch(name)
    if match is None or tensor.dim() != 3:
        return []
    experts, rows, columns = tensor.shape
    rows //= len(FUSED[match[2]])
    shape = (rows, experts * columns) if match[2] == "down_proj" else (experts * rows, columns)
    modules = [f"{match[1]}.{kind}" for kind in FUSED[match[2]]]
    return [(f"{module}.weight", module, "weight", shape) for module in modules]


def fused(name: str, tensor: torch.Tensor, parts: list[Entry]) -> Entry:
    """The recipe of that tensor from those of its parts."""
    shape = tuple(tensor.shape)

    def make(dtype: torch.dtype) -> torch.Tensor:
        made = [part.make(dtype) for part in parts]
        if name.endswith(".down_proj"):  # [d, E·F]
            return made[0].unflatten(1, (shape[0], -1)).movedim(1, 0).contiguous()
        return torch.cat([one.unflatten(0, (shape[0], -1)) for one in made], dim=1)

    return Entry(name, shape, make)


def experts_of(config: Any) -> int | None:
    """The number of experts of a stock configuration."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)


def with_experts(source: Weights, config: Any) -> Weights:
    """The weights of a source, experts put together if its class has any."""
    count = experts_of(config)
    return source if count is None else ExpertWeights(source, count)


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
