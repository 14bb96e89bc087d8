"""Finite groups as permutations of points: their elements, means over them, and real irreducible representations."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .orders import LISTED, OrderError, cycles, order_in_words, order_of


# Traces and relations of float64 matrices that are closer than this are equal; eigenvalues relative to their range.
EQUAL = 1e-8
ATTEMPTS = 5
# Elements on which characters are compared.
PROBES = 40


class Irreducible(NamedTuple):
    """
    A real irreducible representation.

    Args:
        matrices: Of the generators, orthogonal, `[generators, d, d]`.
        commuting: An orthogonal basis of the matrices that commute with all of it, `[kind, d, d]`, of squared norm d.
            Their number is 1 for a real kind, 2 for a complex and 4 for a quaternionic one.
        character: Traces of all elements, `[order]`.
    """

    matrices: torch.Tensor
    commuting: torch.Tensor
    character: torch.Tensor

    @property
    def dim(self) -> int:
        return self.matrices.shape[-1]

    @property
    def kind(self) -> int:
        return len(self.commuting)


class FiniteGroup:
    """
    The group that permutations of points generate.

    A permutation is an array `p` `[points]` that moves `x` to `p[x]`; `a b` does `b` first.

    Args:
        generators: Permutations `[generators, points]`.
    """

    def __init__(self, generators: np.ndarray):
        self.generators = np.asarray(generators, dtype=np.int64)

    @cached_property
    def order(self) -> int:
        """The number of elements, also where they are too many to list; an [`OrderError`] as of [`order_of`]."""
        return order_of(self._cycles)

    @property
    def _cycles(self) -> list[list[list[int]]]:
        return [cycles(generator) for generator in self.generators]

    @cached_property
    def is_listed(self) -> bool:
        """Whether there are no more than `LISTED` elements."""
        try:
            return self.order <= LISTED
        except OrderError:
            return False

    @cached_property
    def _listed(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.is_listed:
            order = order_in_words(self._cycles)
            raise OrderError(
                f"A group of at most {LISTED} elements can be listed, got one of {order}. Use a representation by "
                "permutations, which needs no list."
            )
        points = self.generators.shape[1]
        known = {np.arange(points).tobytes(): 0}
        elements, made = [np.arange(points)], [(0, -1)]
        for index, element in enumerate(elements):  # which grows meanwhile
            for number, generator in enumerate(self.generators):
                product = generator[element]
                if known.setdefault(product.tobytes(), len(elements)) == len(elements):
                    elements.append(product)
                    made.append((index, number))
        return np.stack(elements), np.array(made)

    @property
    def elements(self) -> np.ndarray:
        """All elements, the identity first, `[order, points]`; an [`OrderError`] if there are more than `LISTED`."""
        return self._listed[0]

    @cached_property
    def chain(self) -> list[np.ndarray]:
        """
        Lists of elements: every element is a product of one of each, in this order, in one way.

        Each list has one element for every place to which the elements that fix all earlier points move the next one.
        """
        left, chain = np.arange(len(self.elements)), []
        while len(left) > 1:
            rows = self.elements[left]
            point = int((rows != np.arange(rows.shape[1])).any(axis=0).argmax())
            chain.append(left[np.unique(rows[:, point], return_index=True)[1]])
            left = left[rows[:, point] == point]
        return chain

    def images(self, matrices: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
        """The matrices of elements in a representation, `[wanted, n, n]`, from those of the generators."""
        made = self._listed[1]
        known = {0: torch.eye(matrices.shape[-1], dtype=matrices.dtype)}
        for index in wanted:
            path = []
            while index not in known:
                path.append(index)
                index = int(made[index, 0])
            for index in reversed(path):
                known[index] = matrices[made[index, 1]] @ known[int(made[index, 0])]
        return torch.stack([known[int(index)] for index in wanted])

    def mean(self, a: torch.Tensor, b: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The mean of `a(g) X b(g)ᵀ` over the group, `[m, n]`, from `a` and `b` of the generators."""
        for level in reversed(self.chain):
            left, right = self.images(a, level), self.images(b, level)
            matrix = torch.stack([p @ matrix @ q.T for p, q in zip(left, right, strict=True)]).mean(0)
        return matrix

    @cached_property
    def _codes(self) -> Callable[[np.ndarray], np.ndarray]:
        """The numbers of elements, from permutations `[n, points]` in the group."""
        points = [
            int((self.elements[level[-1]] != np.arange(self.elements.shape[1])).argmax()) for level in self.chain
        ]
        # An element is known by where it moves the points of the chain.
        weights = self.elements.shape[1] ** np.arange(len(points), dtype=np.float64)
        if not len(points):
            return lambda rows: np.zeros(len(rows), dtype=np.int64)
        if weights[-1] * self.elements.shape[1] < 2**62:
            whole = weights.astype(np.int64)
            codes = self.elements[:, points] @ whole
            order = codes.argsort()
            return lambda rows: order[np.searchsorted(codes, rows[:, points] @ whole, sorter=order)]
        table = {row.tobytes(): index for index, row in enumerate(self.elements)}
        return lambda rows: np.array([table[row.tobytes()] for row in np.ascontiguousarray(rows)])

    @cached_property
    def regular(self) -> np.ndarray:
        """The generators as permutations of the elements, which they multiply from the left, `[generators, order]`."""
        return np.stack([self._codes(generator[self.elements]) for generator in self.generators])

    @cached_property
    def irreducibles(self) -> list[Irreducible]:
        """
        All real irreducible representations up to equivalence: the trivial one first, then by size.

        The eigenspaces of a random symmetric matrix that commutes with the regular representation are irreducible.
        Characters decide which are equivalent, and two sums over the group check that none is missing.

        Raises:
            OrderError: if the group has more than `LISTED` elements.
        """
        for attempt in range(ATTEMPTS):
            found = self._irreducibles(torch.Generator().manual_seed(attempt))
            if sum(one.dim**2 / one.kind for one in found) == len(self.elements):
                return sorted(found, key=lambda one: (one.dim, one.kind, (-one.character).round(decimals=6).tolist()))
        raise ArithmeticError(f"No random matrix split the {len(self.elements)} elements into irreducible parts.")

    def _irreducibles(self, generator: torch.Generator) -> list[Irreducible]:
        order = len(self.elements)
        inverse = np.empty_like(self.elements)
        np.put_along_axis(inverse, self.elements, np.arange(self.elements.shape[1])[None].repeat(order, 0), axis=1)
        values = torch.randn(order, generator=generator, dtype=torch.float64)
        values = values + values[torch.from_numpy(self._codes(inverse))]
        commuting = torch.stack([values[torch.from_numpy(self._codes(row[self.elements]))] for row in inverse])
        eigenvalues, vectors = torch.linalg.eigh(commuting)
        gaps = (eigenvalues.diff() > EQUAL * (eigenvalues[-1] - eigenvalues[0])).nonzero()[:, 0] + 1
        moves = torch.from_numpy(self.regular)
        # Drawn apart: those at equal distances may lie in a subgroup, on which other characters agree too.
        probes = torch.randperm(order, generator=torch.Generator().manual_seed(0))[:PROBES].tolist()
        found: list[tuple[torch.Tensor, Irreducible]] = []
        for part in vectors.tensor_split(gaps, dim=1):
            matrices = torch.stack([part[move].T @ part for move in moves])
            traces = self.images(matrices, probes).diagonal(dim1=-2, dim2=-1).sum(-1)
            if all((traces - known).abs().max() > EQUAL**0.5 for known, _ in found):
                found.append((traces, self._irreducible(matrices, generator)))
        if any(abs(one.character.square().mean() - one.kind) > EQUAL for _, one in found):
            return []
        return [one for _, one in found]

    def _irreducible(self, matrices: torch.Tensor, generator: torch.Generator) -> Irreducible:
        character = self.images(matrices, range(len(self.elements))).diagonal(dim1=-2, dim2=-1).sum(-1)
        size, basis = matrices.shape[-1], [torch.eye(matrices.shape[-1], dtype=torch.float64)]
        for _ in range(round(float(character.square().mean())) - 1):
            drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
            drawn = self.mean(matrices, matrices, drawn)
            for one in basis:
                drawn = drawn - (drawn * one).sum() / size * one
            basis.append(drawn * (size**0.5 / drawn.norm()))
        return Irreducible(matrices, torch.stack(basis), character)
