"""Polar factors of matrices in shards: every process gets its own blocks, makes their factors, and sends them back."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .dealing import Box, Layout, Part, inside, numel, rounds_of, shape_of


def layout_of(parameter: DTensor, blocks: int, dim: int) -> Layout | None:
    """How a matrix lies on its mesh; `None` if not by shards and copies alone, or if ranks are in another order."""
    ranks = _ranks(parameter.device_mesh)
    if ranks != sorted(ranks):
        return None
    cuts: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []
    for direction, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            return None
        # FSDP2 shards what tensor parallelism has sharded before, and says so by strides.
        strided = getattr(placement, "split_factor", 1) > 1
        (late if strided else cuts).append((direction, placement.dim % 2))
    if len(late) > 1:
        return None
    rows, columns = parameter.shape
    return Layout((rows, columns), blocks, dim, tuple(parameter.device_mesh.shape), (*cuts, *late))


def map_blocks(
    layouts: Sequence[Layout],
    mesh: DeviceMesh,
    read: Callable[[int, Box], torch.Tensor],
    function: Callable[[torch.Tensor], torch.Tensor],
    write: Callable[[int, Box, torch.Tensor], None],
    like: torch.Tensor,
) -> None:
    """
    `function` of every block of matrices in shards. Every process of the mesh must call this.

    Args:
        layouts: Of all matrices.
        mesh: The mesh that all of them lie on.
        read: The values of a box of one matrix, which lies in this process's shard.
        function: Maps a stack `[N, m, n]` to one of the same shape, each matrix by itself.
        write: Takes the result of such a box.
        like: A tensor with the dtype and the device of what is sent.
    """
    group = _group_of(mesh)
    process = dist.get_rank(group)

    def exchange(out: Sequence[Part], tensors: Iterable[torch.Tensor], into: Sequence[Part]) -> Iterator[torch.Tensor]:
        into = [part for part in into if part.peer != process]
        sizes = []
        for side in (out, into):
            counts = Counter[int]()
            for part in side:
                counts[part.peer] += numel(part.box)
            sizes.append([counts[peer] for peer in range(mesh.size())])
        return _exchange(tensors, [part.box for part in into], sizes[0], sizes[1], group, like)

    for turn in rounds_of(tuple(layouts), (process,))[process]:
        parts: Iterator[torch.Tensor] = iter(())
        if turn.gathers:
            parts = exchange(turn.given, (read(part.matrix, part.box) for part in turn.given), turn.taken)
        stacks = Stacks(turn.blocks, like)
        for part in turn.taken:
            own = part.peer == process
            stacks.at(part).copy_(read(part.matrix, part.box) if own else next(parts))
        del parts
        stacks.map_(function)
        for wave in turn.waves:
            parts = iter(())
            if wave.scatters:
                parts = exchange(wave.returned, map(stacks.at, wave.returned), wave.received)
            for part in wave.received:
                write(part.matrix, part.box, stacks.at(part) if part.peer == process else next(parts))
            del parts
        del stacks


class Stacks:
    """Blocks, those of one shape in one tensor `[N, m, n]`."""

    def __init__(self, blocks: Sequence[tuple[int, Box]], like: torch.Tensor):
        counts: dict[tuple[int, int], int] = {}
        self._places = []
        for _, box in blocks:
            shape = shape_of(box)
            row = counts.get(shape, 0)
            counts[shape] = row + 1
            self._places.append((shape, row, box))
        self.tensors = {shape: like.new_empty(count, *shape) for shape, count in counts.items()}

    def at(self, part: Part) -> torch.Tensor:
        """Where a part of a block is."""
        shape, row, box = self._places[part.block]
        return self.tensors[shape][row][inside(part.box, box)]

    def map_(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every stack by its image."""
        for shape in self.tensors:
            self.tensors[shape] = function(self.tensors[shape])


def _exchange(
    tensors: Iterable[torch.Tensor],
    boxes: Sequence[Box],
    given: Sequence[int],
    taken: Sequence[int],
    group: dist.ProcessGroup,
    like: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Send tensors, so many elements to each process in order, and get those of these boxes."""
    buffer, result = like.new_empty(sum(given)), like.new_empty(sum(taken))
    start = 0
    for tensor in tensors:
        buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        start += tensor.numel()
    dist.all_to_all_single(result, buffer, list(taken), list(given), group=group)
    pieces = result.split([numel(box) for box in boxes])
    return (piece.view(shape_of(box)) for piece, box in zip(pieces, boxes, strict=True))


def _ranks(mesh: DeviceMesh) -> list[int]:
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All processes of a mesh, whose places in it are their ranks there."""
    if mesh.ndim == 1:
        return mesh.get_group()
    world = dist.group.WORLD
    return world if mesh.size() == dist.get_world_size() else _new_group(tuple(_ranks(mesh)), world)


@lru_cache(maxsize=16)
def _new_group(ranks: tuple[int, ...], world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Made by these processes alone, once in a `world`."""
    return dist.new_group(list(ranks), use_local_synchronization=True)
