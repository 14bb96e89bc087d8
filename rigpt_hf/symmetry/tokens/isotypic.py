"""Coordinates in which a group acts by its irreducible representations, and the projection on what it leaves alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ...extras import needs
from .group import ATTEMPTS, EQUAL, FiniteGroup
from .orders import LISTED, OrderError


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


class Axis:
    """An axis of a parameter, as parts; the same for every axis with the same matrices."""

    def __init__(self, parts: Sequence[Part], dims: Sequence[int]):
        self.parts, self.dims = parts, dims
        self._changes: dict[tuple[torch.dtype, torch.device], Change] = {}

    @cached_property
    def multiplicities(self) -> dict[int, int]:
        """How often each irreducible is in it."""
        found: dict[int, int] = {}
        for part in self.parts:
            for irreducible, count in part.content:
                found[irreducible] = found.get(irreducible, 0) + count * len(part.places)
        return found

    @cached_property
    def blocks(self) -> dict[int, slice]:
        """By irreducible where its copies are, one after the other, among the coordinates that `change` leads to."""
        found, start = {}, 0
        for irreducible, count in sorted(self.multiplicities.items()):
            found[irreducible] = slice(start, start + count * self.dims[irreducible])
            start = found[irreducible].stop
        return found

    def change(self, like: torch.Tensor) -> "Change":
        """The change to irreducible coordinates, for tensors of this dtype on this device."""
        kind = like.dtype, like.device
        if kind not in self._changes:
            self._changes[kind] = Change(self, like)
        return self._changes[kind]


class Change:
    """
    To coordinates of an axis in which irreducibles follow each other, and back: first to the order of the parts, then
    each part by its basis, and its irreducibles to their places. Tensors are `[..., length, n]`.
    """

    def __init__(self, axis: Axis, like: torch.Tensor):
        filled = {irreducible: block.start for irreducible, block in axis.blocks.items()}
        # Of each part where it begins, its shape and basis; and of its irreducibles where they are in it and go to.
        self.parts: list[tuple[int, torch.Size, torch.Tensor | None, list[tuple[int, int, int]]]] = []
        start, order = 0, []
        for part in axis.parts:
            pieces, used = [], 0
            for irreducible, count in part.content:
                width = count * axis.dims[irreducible]
                pieces.append((used, width, filled[irreducible]))
                filled[irreducible] += len(part.places) * width
                used += width
            basis = None if part.basis is None else part.basis.to(like)
            self.parts.append((start, part.places.shape, basis, pieces))
            order.append(part.places.flatten())
            start += part.places.numel()
        places = torch.cat(order)
        if all(basis is None for _, _, basis, _ in self.parts):
            # Nothing but an order is left.
            numbers = self._sorted(places[:, None].double())[:, 0].long()
            places, self.parts = numbers, []
        self.gather, self.scatter = Order(places, like.device), Order(places.argsort(), like.device)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        """The coordinates of a tensor; the tensor itself where they are its own."""
        tensor = self.gather(tensor)
        return self._sorted(tensor) if self.parts else tensor

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `to`."""
        if self.parts:
            result = torch.empty_like(tensor)
            for start, shape, basis, pieces in self.parts:
                block = _copies(result, start, shape)
                made = block if basis is None else torch.empty_like(block)
                for used, width, place in pieces:
                    made.narrow(-2, used, width).copy_(_copies(tensor, place, (shape[0], width)))
                if basis is not None:
                    block.copy_(basis @ made)
            tensor = result
        return self.scatter(tensor)

    def _sorted(self, tensor: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(tensor)
        for start, shape, basis, pieces in self.parts:
            block = _copies(tensor, start, shape)
            made = block if basis is None else basis.T @ block
            for used, width, place in pieces:
                _copies(result, place, (shape[0], width)).copy_(made.narrow(-2, used, width))
        return result


class Order:
    """Rows of a tensor `[..., length, n]` in another order; the tensor itself if it is theirs."""

    def __init__(self, order: torch.Tensor, device: torch.device):
        starts = [0, *((order.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(order)]
        self.runs = [(int(order[a]), a, b - a) for a, b in pairwise(starts)]
        # Indices along the last axis of the memory are slow on CPUs, many copies elsewhere.
        self.index = None if device.type == "cpu" and 2 * len(self.runs) < len(order) else order.to(device)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if len(self.runs) == 1:
            return tensor
        if self.index is not None:
            return tensor.index_select(-2, self.index)
        result = torch.empty_like(tensor)
        for source, target, length in self.runs:
            result.narrow(-2, target, length).copy_(tensor.narrow(-2, source, length))
        return result


def _copies(tensor: torch.Tensor, start: int, shape: Sequence[int]) -> torch.Tensor:
    """Rows of a tensor `[..., length, n]` from `start` on as `[..., copies, size, n]`, in the same memory."""
    return tensor.narrow(-2, start, shape[0] * shape[1]).unflatten(-2, tuple(shape))


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
        self.listed = group.is_listed
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

    def fixed(self, axes: Sequence[Axis | None], lengths: Sequence[int]) -> int:
        """The dimensions of what the group leaves alone among tensors with one or two such axes of these lengths."""
        first, *rest = (
            {0: length} if axis is None else axis.multiplicities for axis, length in zip(axes, lengths, strict=True)
        )
        second = rest[0] if rest else {0: 1}
        return sum(self.kinds[one] * many * second.get(one, 0) for one, many in first.items())

    def project(self, tensor: torch.Tensor, axes: Sequence[Axis | None]) -> torch.Tensor:
        """
        The nearest tensor that the group leaves alone, in the dtype of `tensor`.

        Args:
            tensor: `[..., m]` or `[..., m, n]`: one axis or two behind any others.
            axes: How the group acts on them; `None` where it does nothing.
        """
        if len(axes) == 1:
            return self.project(tensor[..., None], [*axes, None])[..., 0]
        first, second = (None if axis is None else (axis, axis.change(tensor)) for axis in axes)
        tensor = tensor if first is None else first[1].to(tensor)
        tensor = tensor if second is None else second[1].to(tensor.mT).mT
        kept = torch.zeros_like(tensor)
        every = {0: slice(None)}
        rows, columns = (every if one is None else one[0].blocks for one in (first, second))
        for index in rows.keys() & columns.keys():
            block, target = (one[..., rows[index], columns[index]] for one in (tensor, kept))
            size, commuting = self.dims[index], self.references[index].commuting
            if size == 1:
                target.copy_(block)
                continue
            block, target = (one.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)) for one in (block, target))
            if len(commuting) == 1:
                means = block.diagonal(dim1=-3, dim2=-1).mean(-1, keepdim=True)
                target.diagonal(dim1=-3, dim2=-1).copy_(means.expand(*means.shape[:-1], size))
            else:
                weights = torch.einsum("...jaib,kab->...jik", block, commuting.to(block)) / size
                target.copy_(torch.einsum("...jik,kab->...jaib", weights, commuting.to(block)))
        kept = kept if second is None else second[1].back(kept.mT).mT
        return kept if first is None else first[1].back(kept)


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
