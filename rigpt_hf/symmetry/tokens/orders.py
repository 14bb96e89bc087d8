"""Cycles of permutations, and how many elements a group of permutations has, in time that grows as what is written."""

from collections.abc import Iterable, Sequence
from math import factorial, lcm, log10, prod

import numpy as np


Cycles = Sequence[Sequence[int]]
# Up to this order the elements are listed.
LISTED = 5000
# Points on which larger groups are counted, by a base and strong generators, and numbers that generators are made of.
COUNTED, DENSE = 100, 10**8
# From this order on the words for it are a power of ten.
IN_DIGITS = 10**15


class OrderError(ValueError):
    """A group has too many elements for what is asked."""


def joined(sets: Iterable[Sequence[int]]) -> list[list[int]]:
    """The sets that are left where those with a number in common are one; sorted, and by their least numbers."""
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while (above := parent.setdefault(number, number)) != number:
            parent[number] = number = parent[above]
        return number

    for one in sets:
        for number in one:
            parent[root(number)] = root(one[0])
    found: dict[int, list[int]] = {}
    for number in sorted(parent):
        found.setdefault(root(number), []).append(number)
    return list(found.values())


def cycles(permutation: np.ndarray) -> list[list[int]]:
    """The cycles of a permutation, without those of one."""
    images, seen, found = permutation.tolist(), set(), []
    for start, image in enumerate(images):
        if image == start or start in seen:
            continue
        cycle = [start]
        while (image := images[cycle[-1]]) != start:
            cycle.append(image)
        seen.update(cycle)
        found.append(cycle)
    return found


def order_of(generators: Sequence[Cycles]) -> int:
    """
    The order of the group of some permutations, each given by its cycles.

    Raises:
        OrderError: if it has more than `LISTED` elements and is none of those that are counted: products of groups
            that act on different points, each of one generator, symmetric or alternating (also on several sets of
            points alike), or on at most `COUNTED` points.
    """
    moved = [[point for cycle in one for point in cycle] for one in generators]
    block_of = {point: number for number, block in enumerate(joined(moved)) for point in block}
    blocks: dict[int, list[Cycles]] = {}
    for one, points in zip(generators, moved, strict=True):
        if points:
            blocks.setdefault(block_of[points[0]], []).append(one)
    return prod(map(_order, blocks.values()))


def order_in_words(generators: Sequence[Cycles]) -> str:
    """[`order_of`] as a person reads it."""
    try:
        order = order_of(generators)
    except OrderError:
        return f"more than {LISTED:,}"
    return f"{order:,}" if order < IN_DIGITS else f"about 10^{log10(order):.1f}"


def _order(generators: Sequence[Cycles]) -> int:
    """The order of a group that is no product."""
    if len(generators) == 1:
        return lcm(*map(len, generators[0]))
    actions = _actions(generators)
    sizes = [action.shape[1] for action in actions]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    rows = np.concatenate([action + start for action, start in zip(actions, starts, strict=True)], axis=1)
    if len(sizes) == 1 or sum(sizes) <= COUNTED:
        from sympy.combinatorics import Permutation, PermutationGroup

        group = PermutationGroup([Permutation(row.tolist()) for row in rows])
        if sum(sizes) <= COUNTED:
            return int(group.order())
        if group.is_alt_sym(eps=1e-6):  # the chance to overlook one, whose order is then not told
            return factorial(sizes[0]) // (1 if any(one.is_odd for one in group.generators) else 2)
    # There is an element for each point of an orbit.
    if max(sizes) > LISTED or (listed := _count(rows.astype(np.int32))) > LISTED:
        raise OrderError(f"A group of more than {LISTED} elements must be symmetric to be counted, got another one.")
    return listed


def _actions(generators: Sequence[Cycles]) -> list[np.ndarray]:
    """The permutations of each orbit by the generators, `[generators, n]`, once where they are the same on several."""
    orbits = joined(cycle for one in generators for cycle in one)
    if len(generators) * sum(map(len, orbits)) > DENSE:
        raise OrderError(
            f"A group of at most {DENSE} numbers can be counted, got {len(generators)} larger generators."
        )
    place = {point: (number, index) for number, orbit in enumerate(orbits) for index, point in enumerate(orbit)}
    actions = [np.arange(len(orbit))[None].repeat(len(generators), 0) for orbit in orbits]
    for generator, one in enumerate(generators):
        for cycle in one:
            number = place[cycle[0]][0]
            places = [place[point][1] for point in cycle]
            actions[number][generator, places] = places[1:] + places[:1]
    return list({action.tobytes(): action for action in actions}.values())


def _count(generators: np.ndarray) -> int:
    """The number of elements, which are made one after the other; any number above `LISTED` if they are more."""
    unit = np.arange(generators.shape[1], dtype=generators.dtype)
    known, elements = {unit.tobytes()}, [unit]
    for element in elements:  # which grows meanwhile
        for made in generators[:, element]:
            if made.tobytes() not in known:
                known.add(made.tobytes())
                elements.append(made.copy())
        if len(elements) > LISTED:
            break
    return len(elements)
