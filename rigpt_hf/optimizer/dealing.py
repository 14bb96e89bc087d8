"""
Who makes which polar factors of matrices in shards: read from layouts alone, alike on every process, nothing is sent.

A block is a head of a matrix or all of it, a box is a rectangle of a matrix. Every block has an owner among those that
hold the most of it, so that what one process holds whole stays there. Owners get their blocks in rounds, in each at
most as much as the largest block, so no process ever holds more than that of other people's shards.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple


Interval = tuple[int, int]
Box = tuple[Interval, Interval]


class Layout(NamedTuple):
    """
    How a matrix lies on a mesh of processes.

    Args:
        shape: Of the whole matrix.
        blocks, dim: Into how many parts it falls, and along which axis.
        mesh: Shape of the mesh.
        cuts: Pairs of a direction of the mesh and the axis that it cuts, in the order of cutting. Along the other
            directions there are copies.
    """

    shape: tuple[int, int]
    blocks: int
    dim: int
    mesh: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]

    @property
    def block_shape(self) -> tuple[int, int]:
        """Of one of the parts."""
        rows, columns = (size // (self.blocks if dim == self.dim else 1) for dim, size in enumerate(self.shape))
        return rows, columns


class Block(NamedTuple):
    """A block `box` of a matrix, its owner, whose shards it is made of, and whose shards its factor goes into."""

    matrix: int
    box: Box
    owner: int
    sources: tuple[tuple[int, Box], ...]
    holders: tuple[tuple[int, Box], ...]


class Part(NamedTuple):
    """A box of a block that goes to or comes from `peer`; `block` counts in our own round, or is -1."""

    peer: int
    matrix: int
    block: int
    box: Box


class Round(NamedTuple):
    """
    One process's side of a round.

    Args:
        blocks: Matrix and box of those that it makes the factors of.
        given, taken: Parts of its shards, for others' blocks; parts of its own blocks, those that it holds among them.
        returned, received: Parts of its factors, for others' shards; parts of its own shards, likewise.
        gathers, scatters: Whether anybody sends anything before or after.
    """

    blocks: tuple[tuple[int, Box], ...]
    given: tuple[Part, ...]
    taken: tuple[Part, ...]
    returned: tuple[Part, ...]
    received: tuple[Part, ...]
    gathers: bool
    scatters: bool


def boxes_of(layout: Layout) -> tuple[Box, ...]:
    """The box of every process, in the order of the mesh; the last ones may be empty, as `torch.chunk` leaves them."""
    boxes = []
    for place in product(*map(range, layout.mesh)):
        box = [(0, size) for size in layout.shape]
        for direction, dim in layout.cuts:
            start, stop = box[dim]
            size = -(-(stop - start) // layout.mesh[direction])
            begin = min(start + place[direction] * size, stop)
            box[dim] = (begin, min(begin + size, stop))
        boxes.append((box[0], box[1]))
    return tuple(boxes)


def shape_of(box: Box) -> tuple[int, int]:
    """Its rows and columns."""
    (top, bottom), (left, right) = box
    return bottom - top, right - left


def numel(box: Box) -> int:
    """The number of its elements."""
    rows, columns = shape_of(box)
    return rows * columns


def inside(box: Box, whole: Box) -> tuple[slice, slice]:
    """Where a box is in a tensor that holds another one."""
    (top, bottom), (left, right) = box
    (above, _), (before, _) = whole
    return slice(top - above, bottom - above), slice(left - before, right - before)


@lru_cache(maxsize=16)
def deal(layouts: tuple[Layout, ...]) -> tuple[tuple[Block, ...], ...]:
    """All blocks of matrices on one mesh, in rounds: those with the fewest candidates and the costliest first."""
    waiting = [
        (layout, matrix, box, boxes_of(layout))
        for matrix, layout in enumerate(layouts)
        for box in _blocks_of(layout)
        if numel(box)
    ]
    dealt = []
    for layout, matrix, box, boxes in waiting:
        holders = tuple(
            (process, part) for process, held in enumerate(boxes) if numel(part := _overlap(held, box)) > 0
        )
        # Half is enough: the last of uneven shards are small, and would never be asked.
        most = max(numel(part) for _, part in holders)
        candidates = [process for process, part in holders if 2 * numel(part) >= most]
        rows, columns = shape_of(box)
        dealt.append((len(candidates), -rows * columns * min(rows, columns), layout, matrix, box, holders, candidates))
    load = [0] * len(waiting[0][3]) if waiting else []
    queues: list[list[Block]] = [[] for _ in load]
    dealt.sort(key=lambda item: (item[0], item[1], item[3], item[4]))
    for _, cost, layout, matrix, box, holders, candidates in dealt:
        owner = min(candidates, key=lambda process: (load[process], process))
        load[owner] -= cost
        queues[owner].append(Block(matrix, box, owner, _sources(owner, holders, layout.mesh), holders))
    budget = max((numel(box) for _, _, box, _ in waiting), default=0)
    rounds: list[list[Block]] = []
    for queue in queues:
        # Blocks of one shape together, as they are stacked.
        queue.sort(key=lambda block: (-numel(block.box), shape_of(block.box), block.matrix, block.box))
        number, filled = 0, 0
        for block in queue:
            if filled + numel(block.box) > budget:
                number, filled = number + 1, 0
            filled += numel(block.box)
            rounds += [[] for _ in range(number + 1 - len(rounds))]
            rounds[number].append(block)
    return tuple(map(tuple, rounds))


@lru_cache(maxsize=16)
def rounds_of(layouts: tuple[Layout, ...], process: int, order: tuple[int, ...]) -> tuple[Round, ...]:
    """
    A process's side of all rounds.

    Args:
        order: The processes in the order of their ranks, which is that of the buffers.
    """
    rank = {peer: index for index, peer in enumerate(order)}
    rounds = []
    for blocks in deal(layouts):
        own: list[tuple[int, Box]] = []
        given: list[Part] = []
        taken: list[Part] = []
        returned: list[Part] = []
        received: list[Part] = []
        gathers = scatters = False
        for block in blocks:
            for peer, box in block.sources:
                gathers |= peer != block.owner
                if peer == process != block.owner:
                    given.append(Part(block.owner, block.matrix, -1, box))
                if block.owner == process:
                    taken.append(Part(peer, block.matrix, len(own), box))
            for peer, box in block.holders:
                scatters |= peer != block.owner
                if peer == process:
                    index = len(own) if block.owner == process else -1
                    received.append(Part(block.owner, block.matrix, index, box))
                if block.owner == process != peer:
                    returned.append(Part(peer, block.matrix, len(own), box))
            if block.owner == process:
                own.append((block.matrix, block.box))
        for side in (given, taken, returned, received):
            side.sort(key=lambda part: rank[part.peer])
        sides = (tuple(given), tuple(taken), tuple(returned), tuple(received))
        rounds.append(Round(tuple(own), *sides, gathers, scatters))
    return tuple(rounds)


def _blocks_of(layout: Layout) -> list[Box]:
    """Equal boxes along the axis of the blocks."""
    size = layout.shape[layout.dim] // layout.blocks
    boxes = []
    for index in range(layout.blocks):
        box = [(0, length) for length in layout.shape]
        box[layout.dim] = (index * size, (index + 1) * size)
        boxes.append((box[0], box[1]))
    return boxes


def _overlap(a: Box, b: Box) -> Box:
    (rows, columns) = (
        (max(first[0], second[0]), max(max(first[0], second[0]), min(first[1], second[1])))
        for first, second in zip(a, b, strict=True)
    )
    return rows, columns


def _sources(owner: int, holders: Sequence[tuple[int, Box]], mesh: tuple[int, ...]) -> tuple[tuple[int, Box], ...]:
    """Of copies of a box, the one that is along the fewest directions from the owner."""
    places = list(product(*map(range, mesh)))
    nearest: dict[Box, tuple[int, int]] = {}
    for process, box in holders:
        apart = sum(a != b for a, b in zip(places[process], places[owner], strict=True))
        nearest[box] = min(nearest.get(box, (apart, process)), (apart, process))
    return tuple((process, box) for box, (_, process) in nearest.items())
