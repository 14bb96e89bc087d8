"""Coordinates in which a group acts by its irreducible representations, and the projection on what it leaves alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ...extras import needs
from .group import ATTEMPTS, EQUAL, LISTED, FiniteGroup, OrderError


class Reference(NamedTuple):
    """
    An irreducible representation as a part of a representation.

    Args:
        whole: That representation, of the generators, `[generators, n, n]`.
        basis: Orthonormal vectors of the part, `[n, d]`.
        commuting: As of [`Irreducible`], `[kind, d, d]`.
    """

    whole: torch.Tensor
    basis: torch.Tensor
    commuting: torch.Tensor

    @property
    def dim(self) -> int:
        return self.basis.shape[1]

    @property
    def matrices(self) -> torch.Tensor:
        """The matrices of the generators, `[generators, d, d]`."""
        return self.basis.T @ self.whole @ self.basis


@dataclass(frozen=True)
class Part:
    """
    Places of an axis that the group mixes among themselves only, together with others on which it does the same.

    Args:
        places: `[copies, n]`.
        basis: To irreducible coordinates, `[n, n]`; `None` where they are that already.
        content: Irreducible and multiplicity, in the order of these coordinates.
    """

    places: torch.Tensor
    basis: torch.Tensor | None
    content: tuple[tuple[int, int], ...]

    @cached_property
    def index(self) -> Any:
        """The index that selects the places: a slice where they follow each other, which is quicker than a list."""
        flat = self.places.flatten()
        start = int(flat[0])
        in_order = torch.equal(flat, torch.arange(start, start + len(flat)))
        return slice(start, start + len(flat)) if in_order else flat


class Axis:
    """An axis of a parameter, as parts; the same for every axis with the same matrices."""

    def __init__(self, parts: Sequence[Part], dims: Sequence[int]):
        self.parts, self.dims = parts, dims

    @cached_property
    def multiplicities(self) -> dict[int, int]:
        """How often each irreducible is in it."""
        found: dict[int, int] = {}
        for part in self.parts:
            for irreducible, count in part.content:
                found[irreducible] = found.get(irreducible, 0) + count * len(part.places)
        return found

    def split(self, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
        """By irreducible its coordinates `[multiplicity, d, ...]`, of a tensor with the axis first `[length, ...]`."""
        found: dict[int, list[torch.Tensor]] = {}
        for part in self.parts:
            block = tensor[part.index].unflatten(0, part.places.shape)  # [copies, n, ...]
            if part.basis is not None:
                block = torch.tensordot(block, part.basis.to(block), dims=([1], [0])).movedim(-1, 1)
            start = 0
            for irreducible, count in part.content:
                size = count * self.dims[irreducible]
                piece = block[:, start : start + size]
                shape = (len(block) * count, self.dims[irreducible], *tensor.shape[1:])
                found.setdefault(irreducible, []).append(piece.reshape(shape))
                start += size
        return {irreducible: torch.cat(pieces) for irreducible, pieces in found.items()}

    def join(self, pieces: dict[int, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`; irreducibles that are not among the pieces are zero. `like` has shape and dtype."""
        result, used = torch.zeros_like(like), dict.fromkeys(pieces, 0)
        for part in self.parts:
            blocks = []
            for irreducible, count in part.content:
                rows, size = len(part.places) * count, count * self.dims[irreducible]
                if irreducible in pieces:
                    piece = pieces[irreducible][used[irreducible] : used[irreducible] + rows]
                    used[irreducible] += rows
                    blocks.append(piece.reshape(len(part.places), size, *like.shape[1:]))
                else:
                    blocks.append(like.new_zeros(len(part.places), size, *like.shape[1:]))
            block = torch.cat(blocks, dim=1)
            if part.basis is not None:
                block = torch.tensordot(block, part.basis.to(block), dims=([1], [1])).movedim(-1, 1)
            result[part.index] = block.flatten(0, 1)
        return result


class Decomposition:
    """
    The irreducible representations of a group that are met, and axes in their coordinates.

    Args:
        group: Whose.
        orbits: Permutation representations `[generators, n]` in which irreducibles are looked for where the group is
            too large to list; then all representations must be by permutations.
    """

    def __init__(self, group: FiniteGroup, orbits: Sequence[np.ndarray]):
        self.group = group
        self.listed = group.order <= LISTED
        self._parts: dict[bytes, tuple[torch.Tensor | None, tuple[tuple[int, int], ...]]] = {}
        self._random = torch.Generator().manual_seed(0)
        count = len(group.generators)
        one = Reference(torch.ones(count, 1, 1).double(), torch.ones(1, 1).double(), torch.ones(1, 1, 1).double())
        self.references: list[Reference] = [one]
        if self.listed:
            for found in group.irreducibles[1:]:
                self.references.append(Reference(found.matrices, torch.eye(found.dim).double(), found.commuting))
        else:
            for orbit in orbits:
                self._split(matrices_of(orbit), discover=True)

    @property
    def dims(self) -> list[int]:
        """Dimensions of the irreducibles."""
        return [reference.dim for reference in self.references]

    @property
    def kinds(self) -> list[int]:
        """Dimensions of what commutes with the irreducibles: 1, 2 or 4."""
        return [len(reference.commuting) for reference in self.references]

    def mean(self, a: torch.Tensor, b: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The mean of `a(g) X b(g)ᵀ` over the group, `[m, n]`."""
        if self.listed:
            return self.group.mean(a, b, matrix)
        return pair_mean(permutations_of(a), permutations_of(b), matrix)

    def axis(self, acts: Sequence[Callable[[torch.Tensor], torch.Tensor]], length: int) -> Axis:
        """
        An axis of this length.

        Args:
            acts: What each generator does to a tensor `[length, ...]`; orthogonal, and linear.
            length: Of the axis.
        """
        together: dict[bytes, list[np.ndarray]] = {}
        kept: dict[bytes, torch.Tensor] = {}
        for places, block in _blocks(acts, length, self._random):
            key = (block.numpy() + 0.0).round(9).tobytes()
            together.setdefault(key, []).append(places)
            kept[key] = block
        parts = []
        for key, rows in together.items():
            if key not in self._parts:
                self._parts[key] = self._split(kept[key])
            parts.append(Part(torch.from_numpy(np.stack(rows)), *self._parts[key]))
        return Axis(parts, self.dims)

    def _split(self, block: torch.Tensor, discover: bool = False) -> tuple[torch.Tensor | None, tuple]:
        """The basis of a component in irreducible coordinates, and what they are."""
        size = block.shape[-1]
        for index, reference in enumerate(self.references):
            if reference.dim == size and (reference.matrices - block).abs().max() < EQUAL**1.5:
                return None, ((index, 1),)
        for _ in range(ATTEMPTS):
            vectors: dict[int, list[torch.Tensor]] = {}
            for part in self._irreducible_parts(block):
                index, aligned = self._match(block, part, discover)
                vectors.setdefault(index, []).append(aligned)
            if -1 not in vectors:
                order = sorted(vectors)
                basis = torch.cat([vector for index in order for vector in vectors[index]], dim=1)
                return basis, tuple((index, len(vectors[index])) for index in order)
        raise ValueError(
            f"A representation must be made of the irreducible ones that are known, got {size} dimensions that hold "
            "another. A group too large to list has only those of its permutations of tokens."
        )

    def _irreducible_parts(self, block: torch.Tensor) -> Iterator[torch.Tensor]:
        drawn = torch.randn(block.shape[1:], generator=self._random, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.mean(block, block, drawn + drawn.T))
        # All of them are one number where the block is irreducible.
        gaps = (values.diff() > EQUAL * values.abs().max().clamp_min(1e-300)).nonzero()[:, 0] + 1
        yield from vectors.tensor_split(gaps, dim=1)

    def _match(self, block: torch.Tensor, part: torch.Tensor, discover: bool) -> tuple[int, torch.Tensor]:
        """The irreducible that a part is, and the basis in which its matrices are those of the reference."""
        for index, reference in enumerate(self.references):
            if reference.dim != part.shape[1]:
                continue
            drawn = torch.randn(len(part), len(reference.basis), generator=self._random, dtype=torch.float64)
            link = part.T @ self.mean(block, reference.whole, drawn) @ reference.basis
            length = link.norm() / reference.dim**0.5
            if length > EQUAL * len(part) ** 0.5:
                link = link / length
                error = (link @ link.T - torch.eye(reference.dim).double()).abs().max()
                return (index, part @ link) if error < EQUAL else (-1, part)
        if not discover:
            return -1, part
        self.references.append(Reference(block, part, self._commuting(block, part)))
        return len(self.references) - 1, part

    def _commuting(self, block: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        size = part.shape[1]
        basis = [torch.eye(size, dtype=torch.float64)]
        while len(basis) < 4:
            drawn = torch.randn(block.shape[1:], generator=self._random, dtype=torch.float64)
            inner = part.T @ self.mean(block, block, drawn) @ part
            for one in basis:
                inner = inner - (inner * one).sum() / size * one
            if inner.norm() < EQUAL * size:
                break
            basis.append(inner * (size**0.5 / inner.norm()))
        return torch.stack(basis)

    def project(self, tensor: torch.Tensor, axes: Sequence[Axis | None]) -> torch.Tensor:
        """
        The nearest tensor that the group leaves alone, in the dtype of `tensor`.

        Args:
            tensor: `[..., m]` or `[..., m, n]`: one axis or two behind any others.
            axes: How the group acts on them; `None` where it does nothing.
        """
        first = axes[0] or Axis([Part(torch.arange(tensor.shape[-len(axes)])[None].T, None, ((0, 1),))], self.dims)
        front = tensor.movedim(-len(axes), 0)
        pieces = first.split(front)
        if len(axes) == 1:
            kept = {0: pieces[0]} if 0 in pieces else {}
            return first.join(kept, front).movedim(0, -1)
        if axes[1] is None:
            kept = {0: pieces[0]} if 0 in pieces else {}
        else:
            kept = {index: self._fixed(index, piece, axes[1]) for index, piece in pieces.items()}
        return first.join(kept, front).movedim(0, -2)

    def _fixed(self, index: int, piece: torch.Tensor, axis: Axis) -> torch.Tensor:
        front = piece.movedim(-1, 0)  # [n, multiplicity, d, ...]
        coordinates = axis.split(front).get(index)
        if coordinates is None:
            return torch.zeros_like(piece)
        if self.dims[index] > 1:
            commuting = self.references[index].commuting.to(coordinates)  # [kind, d, d]
            weights = torch.einsum("jbia...,kab->kji...", coordinates, commuting) / self.dims[index]
            coordinates = torch.einsum("kji...,kab->jbia...", weights, commuting)
        return axis.join({index: coordinates}, front).movedim(0, -1)


def _blocks(
    acts: Sequence[Callable[[torch.Tensor], torch.Tensor]], length: int, random: torch.Generator
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """The finest sets of places that are not mixed with others, and the matrices of the generators there."""
    probe = torch.randn(length, 1, generator=random, dtype=torch.float64)
    moved = [act(probe)[:, 0] for act in acts]
    order = probe[:, 0].argsort()
    if all(torch.equal(row.sort().values, probe[order, 0]) for row in moved):
        # Matrices of a vocabulary would be too large: where numbers only change places, places are enough.
        permutations = np.empty((len(acts), length), dtype=np.int64)
        for permutation, row in zip(permutations, moved, strict=True):
            permutation[order.numpy()] = row.argsort().numpy()
        links = [(np.arange(length), permutation) for permutation in permutations]
        for places in _connected(np.concatenate(links, axis=1), length):
            yield places, matrices_of(np.searchsorted(places, permutations[:, places]))
        return
    matrices = torch.stack([act(torch.eye(length, dtype=torch.float64)) for act in acts])
    for places in _connected((matrices.abs() > EQUAL).any(dim=0).nonzero().T.numpy(), length):
        yield places, matrices[:, places[:, None], places]


def _connected(links: np.ndarray, length: int) -> list[np.ndarray]:
    labels = _labels(links, length)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _labels(links: np.ndarray, length: int) -> np.ndarray:
    """The number of the connected part of each of `length` nodes, from pairs `[2, links]`."""
    with needs("align"):
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import connected_components

    graph = csr_matrix((np.ones(links.shape[1]), tuple(links)), shape=(length, length))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def matrices_of(permutations: np.ndarray) -> torch.Tensor:
    """Permutations `[generators, n]` as matrices that move row `x` to `p[x]`."""
    n = permutations.shape[1]
    result = torch.zeros(len(permutations), n, n, dtype=torch.float64)
    for matrix, row in zip(result, torch.from_numpy(np.ascontiguousarray(permutations)), strict=True):
        matrix[row, torch.arange(n)] = 1.0
    return result


def permutations_of(matrices: torch.Tensor) -> np.ndarray:
    """The inverse of [`matrices_of`]; an [`OrderError`] if they are no permutations."""
    if not torch.equal(matrices, (matrices == 1).double()):
        raise OrderError(
            f"A group of more than {LISTED} elements must be represented by permutations, got other matrices. Ask for "
            "a permutation representation."
        )
    return matrices.argmax(dim=1).numpy()


def pair_mean(a: np.ndarray, b: np.ndarray, matrix: torch.Tensor) -> torch.Tensor:
    """The mean of `a(g) X b(g)ᵀ`, over orbits of pairs of places: no element of the group is needed."""
    m, n = a.shape[1], b.shape[1]
    targets = [(p[:, None] * n + q).ravel() for p, q in zip(a, b, strict=True)]
    links = np.concatenate([(np.arange(m * n), target) for target in targets], axis=1)
    index = torch.from_numpy(_labels(links, m * n))
    counts = index.bincount()
    sums = torch.zeros(len(counts), dtype=matrix.dtype).index_add_(0, index, matrix.flatten())
    return (sums / counts)[index].reshape(m, n)
