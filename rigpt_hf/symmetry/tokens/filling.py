"""The contents of the frames of a model: which parts of a representation, and how often each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ...configuration_rigpt import RiGPTConfig
from ...frames import Frame, FrameKey, table_of
from .group import EQUAL
from .isotypic import Decomposition, matrices_of
from .symmetry import TokenSymmetry


Blocks = Literal["matrices", "permutations"]
# For each copy of a frame, of each part.
Counts = list[list[int]]
KINDS = ("irreducible", "permutation")
# Share of a space that stays as it is, for what does not depend on the tokens that move.
RESTING = 0.25


@dataclass(frozen=True)
class Filling:
    """
    The parts of which a representation is made, which say it in few numbers.

    Args:
        matrices: Irreducible representations, of the generators, each `[generators, d, d]`.
        permutations: Permutation representations, each `[generators, n]`, `x` to `p[x]`.
        frames: By kind of frame which of the two it is made of, and for each copy (head) how often each is in it; the
            group does nothing in what is left, which comes first.
    """

    matrices: tuple[torch.Tensor, ...]
    permutations: tuple[np.ndarray, ...]
    frames: dict[str, tuple[Blocks, Counts]]

    def elements(self, config: RiGPTConfig, generators: int) -> list[dict[FrameKey, torch.Tensor]]:
        """The elements of each generator in the frames of a configuration."""
        elements: list[dict[FrameKey, torch.Tensor]] = [{} for _ in range(generators)]
        for key, frame in table_of(config).frames.items():
            if key.kind in self.frames:
                for one, action in zip(elements, self._actions(key.kind, frame, generators), strict=True):
                    one[key] = frame.group.representing(action)
        return elements

    def check(self, config: RiGPTConfig, generators: int) -> None:
        """A `ValueError` if the parts are no matrices and permutations of the generators, or do not fit the frames."""
        turns = all(
            part.dim() == 3
            and part.shape == (generators, part.shape[2], part.shape[2])
            and float((part @ part.mT - torch.eye(part.shape[2])).abs().max()) < EQUAL
            for part in self.matrices
        )
        if not turns or not all(
            part.ndim == 2 and len(part) == generators and (np.sort(part) == np.arange(part.shape[1])).all()
            for part in self.permutations
        ):
            raise ValueError(
                f"`filling` must be made of orthogonal matrices and permutations, one for each of the {generators} "
                "generators, got others."
            )
        kinds = fillable(config)
        for kind, (made_of, counts) in self.frames.items():
            represents = kinds[kind].represents if kind in kinds else None
            room = size_of(kinds[kind]) if kind in kinds else 0
            parts: Sequence[Any] = self.matrices if made_of == "matrices" else self.permutations
            filled = max(
                (sum(count * part.shape[-1] for count, part in zip(one, parts, strict=False)) for one in counts),
                default=0,
            )
            suited = represents is not None and made_of in ("permutations", represents)
            suited = suited and len(counts) == kinds[kind].copies and all(len(one) == len(parts) for one in counts)
            if not suited or min((count for one in counts for count in one), default=0) < 0 or filled > room:
                raise ValueError(
                    f"`filling` must fit the frames of the configuration, got {made_of} of {filled} dimensions in "
                    f"{len(counts)} copies of {kind!r}, where there is room for {room}. Choose one for this "
                    "configuration."
                )

    def _actions(self, kind: str, frame: Frame, generators: int) -> list[torch.Tensor]:
        """How each generator acts on the copies of a frame: `[copies, n]` or `[copies, n, n]`."""
        size, (made_of, counts) = size_of(frame), self.frames[kind]
        actions = []
        for one in counts:
            if made_of == "matrices":
                blocks = [block for block, count in zip(self.matrices, one, strict=True) for _ in range(count)]
                rest = torch.eye(size - sum(block.shape[-1] for block in blocks)).double()
                rows = [torch.block_diag(rest, *(block[g] for block in blocks)) for g in range(generators)]
                actions.append(torch.stack(rows))
                continue
            orbits = [orbit for orbit, count in zip(self.permutations, one, strict=True) for _ in range(count)]
            start = size - sum(orbit.shape[1] for orbit in orbits)
            parts = [np.arange(start)[None].repeat(generators, 0)]
            for orbit in orbits:
                parts.append(orbit + start)
                start += orbit.shape[1]
            whole = np.concatenate(parts, axis=1)
            permuted = frame.represents == "permutations"
            actions.append(torch.from_numpy(whole) if permuted else matrices_of(whole))
        return list(torch.stack(actions, dim=1))

    def to_dict(self) -> dict[str, Any]:
        """The content that `from_dict` reads; plain JSON."""
        return {
            "matrices": [block.tolist() for block in self.matrices],
            "permutations": [orbit.tolist() for orbit in self.permutations],
            "frames": {kind: list(content) for kind, content in self.frames.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Filling":
        """The filling that `to_dict` wrote."""
        return cls(
            tuple(torch.tensor(block, dtype=torch.float64) for block in content["matrices"]),
            tuple(np.array(orbit, dtype=np.int64) for orbit in content["permutations"]),
            {kind: (made_of, [list(one) for one in counts]) for kind, (made_of, counts) in content["frames"].items()},
        )


def fillable(config: RiGPTConfig) -> dict[str, Frame]:
    """The kinds of frames that hold a representation, in every layer if layers have their own."""
    frames: dict[str, Frame] = {}
    without = {key.kind for key, frame in table_of(config).frames.items() if not frame.represents}
    for key, frame in table_of(config).frames.items():
        if key.kind not in without:
            frames.setdefault(key.kind, frame)
    return frames


def size_of(frame: Frame) -> int:
    """The dimensions of one copy of a frame, or the number of its neurons."""
    return frame.group.shape(1)[-1]


def choose_filling(
    config: RiGPTConfig,
    symmetry: TokenSymmetry,
    decomposition: Decomposition,
    orbits: Sequence[np.ndarray],
    kind: str,
    resting: float,
    multiplicities: Mapping[str, Sequence[int]],
) -> Filling:
    """
    A filling for the frames of a configuration; arguments as of `Representation.choose`.

    Args:
        decomposition: The irreducible representations of the group.
        orbits: What it does on the sets of tokens that it moves, each `[generators, n]`.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be {' or '.join(KINDS)}, got {kind!r}. Take one of them.")
    if not 0 <= resting < 1:
        raise ValueError(f"`resting` must be at least 0 and below 1, got {resting}. Take {RESTING}.")
    irreducibles = decomposition.references[1:]
    permutations = sorted({orbit.tobytes(): orbit for orbit in orbits}.values(), key=lambda one: -one.shape[1])
    if decomposition.listed:
        permutations = [symmetry.group.regular, *permutations]
    frames: dict[str, tuple[Blocks, Counts]] = {}
    for name, frame in fillable(config).items():
        rooms = [int((1 - resting) * size_of(frame))] * frame.copies
        if frame.represents == "permutations" or kind == "permutation":
            frames[name] = "permutations", _in_turn([orbit.shape[1] for orbit in permutations], rooms)
        elif name in multiplicities:
            counts = _by_hand(multiplicities[name], decomposition.dims, name, size_of(frame))
            frames[name] = "matrices", [counts] * frame.copies
        else:
            # As functions on the group have them: as often as their dimension.
            shares = [one.dim**2 / len(one.commuting) for one in irreducibles]
            frames[name] = "matrices", _in_shares([one.dim for one in irreducibles], shares, rooms)
    placed = [kind for kind, (made_of, _) in frames.items() if made_of == "matrices"]
    if unknown := sorted(set(multiplicities) - set(placed)):
        raise ValueError(
            f"`multiplicities` must be for frames that have room for irreducible representations, got {unknown[0]!r}. "
            f"Here these are {', '.join(placed)}."
        )
    matrices = tuple(one.matrices for one in irreducibles)
    return Filling(matrices if placed else (), tuple(permutations), frames)


def _by_hand(counts: Sequence[int], dims: Sequence[int], kind: str, size: int) -> list[int]:
    filled = sum(count * dim for count, dim in zip(counts, dims, strict=False))
    if len(counts) != len(dims) or filled != size or min(counts) < 0:
        raise ValueError(
            f"`multiplicities` must be one for each of the irreducibles of dimensions {list(dims)}, and fill the "
            f"{size} of {kind}, got {list(counts)}, which fill {filled}."
        )
    return list(counts[1:])


def _in_shares(dims: Sequence[int], shares: Sequence[float], rooms: Sequence[int]) -> Counts:
    """
    How often each fits into each room, in these shares of them all as nearly as can be.

    Where one room cannot hold all, they hold different ones: together the heads of a layer carry every irreducible.
    """
    left, counts = list(rooms), [[0] * len(dims) for _ in rooms]
    wanted = [share / max(sum(shares), 1e-300) * sum(rooms) for share in shares]
    while fitting := [i for i, dim in enumerate(dims) if dim <= max(left)]:
        best = max(fitting, key=lambda i: wanted[i] / dims[i] - sum(one[i] for one in counts))
        room = left.index(max(left))
        counts[room][best] += 1
        left[room] -= dims[best]
    return counts


def _in_turn(sizes: Sequence[int], rooms: Sequence[int]) -> Counts:
    """How often each fits into each room, one after the other and again from the first."""
    counts, at = [[0] * len(sizes) for _ in rooms], 0
    for one, room in zip(counts, rooms, strict=True):
        while any(size <= room for size in sizes):
            index = at % len(sizes)
            if sizes[index] <= room:
                one[index] += 1
                room -= sizes[index]
            at += 1
    return counts
