"""
Who makes which polar factors of matrices in shards: read from layouts alone, alike on every process, nothing is sent.

A block is a head of a matrix or all of it, a box is a rectangle of a matrix. Every block has an owner among those that
hold the most of it, so that what one process holds whole stays there. Owners get their blocks in rounds, in each at
most as much as the largest block, so no process ever holds more than that besides its own shards.
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
        """The shape of one of the parts."""
        rows, columns = (size // (self.blocks if dim == self.dim else 1) for dim, size in enumerate(self.shape))
        return rows, columns


class Block(NamedTuple):
    """
    A block of a matrix.

    Args:
        matrix, box: Which it is.
        owner: The process that makes its factor.
        sources: Which processes give which parts of it; of copies, one.
        waves: Which processes hold which parts of it, copy after copy, the owner's own or nearest copies first.
    """

    matrix: int
    box: Box
    owner: int
    sources: tuple[tuple[int, Box], ...]
    waves: tuple[tuple[tuple[int, Box], ...], ...]


class Part(NamedTuple):
    """A box of a block that goes to or comes from `peer`; `block` counts in our own round, or is -1."""

    peer: int
    matrix: int
    block: int
    box: Box


class Wave(NamedTuple):
    """See [`Round`]."""

    returned: tuple[Part, ...]
    received: tuple[Part, ...]
    scatters: bool


class Round(NamedTuple):
    """
    One process's side of a round.

    Args:
        blocks: Matrix and box of those that it makes the factors of.
        given, taken: Parts of its shards, for others' blocks; parts of its own blocks, those that it holds among them.
        gathers: Whether anybody sends any of these.
        waves: For one copy of all shards after another: parts of its factors, for others' shards; parts of its own
            shards, likewise; and whether anybody sends any.
    """

    blocks: tuple[tuple[int, Box], ...]
    given: tuple[Part, ...]
    taken: tuple[Part, ...]
    gathers: bool
    waves: tuple[Wave, ...]


@lru_cache(maxsize=1024)
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
        queues[owner].append(Block(matrix, box, owner, *_parts(owner, holders, layout.mesh)))
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
def rounds_of(layouts: tuple[Layout, ...], processes: tuple[int, ...]) -> dict[int, tuple[Round, ...]]:
    """The sides of some processes of all rounds."""

    def ordered(parts: list[Part]) -> tuple[Part, ...]:
        return tuple(sorted(parts, key=lambda part: part.peer))

    rounds: dict[int, list[Round]] = {process: [] for process in processes}
    for blocks in deal(layouts):
        # The exchange before the factors are made, and those after it: out, into, and whether anybody sends anything.
        exchanges = [_Exchange(processes) for _ in range(1 + max(len(block.waves) for block in blocks))]
        own: dict[int, list[tuple[int, Box]]] = {process: [] for process in processes}
        for block in blocks:
            number = len(own.get(block.owner, ()))
            for peer, box in block.sources:
                exchanges[0].send(block, number, peer, block.owner, box)
            for exchange, wave in zip(exchanges[1:], block.waves, strict=False):
                for peer, box in wave:
                    exchange.send(block, number, block.owner, peer, box)
            if block.owner in own:
                own[block.owner].append((block.matrix, block.box))
        for process in processes:
            sides = [(ordered(each.out[process]), ordered(each.into[process]), each.happens) for each in exchanges]
            waves = tuple(Wave(*side) for side in sides[1:])
            rounds[process].append(Round(tuple(own[process]), *sides[0], waves))
    return {process: tuple(own) for process, own in rounds.items()}


class _Exchange:
    """Parts on their way, by process: those that leave it, and those that reach it or stay there."""

    def __init__(self, processes: Sequence[int]):
        self.out: dict[int, list[Part]] = {process: [] for process in processes}
        self.into: dict[int, list[Part]] = {process: [] for process in processes}
        self.happens = False

    def send(self, block: Block, number: int, sender: int, receiver: int, box: Box) -> None:
        """Note a part of a block, which is the owner's `number`-th."""
        self.happens |= sender != receiver
        for process, peer, side in ((sender, receiver, self.out), (receiver, sender, self.into)):
            if process in side and (sender != receiver or side is self.into):
                side[process].append(Part(peer, block.matrix, number if process == block.owner else -1, box))


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


def _parts(
    owner: int, holders: Sequence[tuple[int, Box]], mesh: tuple[int, ...]
) -> tuple[tuple[tuple[int, Box], ...], tuple[tuple[tuple[int, Box], ...], ...]]:
    """
    The sources of a block, and its holders in waves. A source is the copy along the fewest directions from the owner;
    waves go on from it round all copies, so that in each of them everybody sends to and hears of other ones.
    """
    places = list(product(*map(range, mesh)))
    copies: dict[Box, list[int]] = {}
    for process, box in holders:
        copies.setdefault(box, []).append(process)
    sources = []
    waves: list[list[tuple[int, Box]]] = [[] for _ in range(max(map(len, copies.values())))]
    for box, processes in copies.items():
        apart = [sum(a != b for a, b in zip(places[one], places[owner], strict=True)) for one in processes]
        nearest = apart.index(min(apart))
        sources.append((processes[nearest], box))
        for wave, process in enumerate(processes[nearest:] + processes[:nearest]):
            waves[wave].append((process, box))
    return tuple(sources), tuple(map(tuple, waves))
