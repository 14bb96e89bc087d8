"""
Groups of matrices that act on frames, with what follows from each: its algebra, its paths, its compact part.

Every group here is cut out of GL(n) by two questions, and its methods read only the answers:

    stretch   "none": lengths matter, so rotations and reflections only;  "common": and one factor for all directions;
              "free": any invertible matrix
    planes    pairs of dimensions that rotary positions turn; the group must commute with these rotations, which leaves
              one rotation (and stretch) per plane, and the full group on the dimensions outside of them

so O(n) is ("none", no planes), GL(n) is ("free", no planes). Elements are stacks `[copies, n, n]` in float64. How a
tensor turns depends on its *role*:

    vector     x -> M x
    covector   x -> M^-T x, so that its product with a vector stays
    metric     λ -> s² λ for the common stretch s: the weight of |covector|² beside vector·covector
    planes     the frequency of each plane: planes may change places or orientation, and their frequencies with them
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..extras import needs
from . import least_norm, spectra
from .base import DEGENERATE, SPREAD, UNSIGNED, Group, Note, Role, View
from .permutation import assignment
from .planes import Planes
from .rotation import haar, so_exp, so_log


Stretch = Literal["none", "common", "free"]
# An anchor leads if it is longer than this part of the longest.
LEADS = 1e-6


@dataclass(frozen=True)
class MatrixGroup(Planes, Group):
    """
    A group of matrices `[n, n]`, see the head of this file.

    Args:
        n: Size of the matrices.
        stretch: The symmetric positive factors that are allowed besides rotations.
        planes: Pairs of dimensions with a rotation of their own that the group must commute with.
        movable: Planes may be exchanged and mirrored, as their frequencies are parameters too.
    """

    n: int
    stretch: Stretch = "none"
    planes: tuple[tuple[int, int], ...] = ()
    movable: bool = False

    def __str__(self) -> str:
        rest = len(self.rest)
        families = {"none": "O({})", "common": "O({})", "free": "GL({})"}
        parts = [families[self.stretch].format(rest)] if rest else []
        if self.planes:
            circle = "GL(1,C)" if self.stretch == "free" else "U(1)"
            parts.insert(0, f"{circle}^{len(self.planes)}")
        if self.stretch == "common":
            parts.insert(0, "R+")
        if self.movable:
            parts.append(f"signed permutations of {len(self.planes)} planes")
        return " x ".join(parts)

    @property
    def dimension(self) -> int:  # type: ignore[override]
        rest, planes = len(self.rest), len(self.planes)
        turns = rest * (rest - 1) // 2 + planes
        return turns + {"none": 0, "common": 1, "free": rest * (rest + 1) // 2 + planes}[self.stretch]

    @property
    def stretches(self) -> bool:  # type: ignore[override]
        return self.stretch != "none"

    @property
    def represents(self) -> Literal["matrices"] | None:  # type: ignore[override]
        # What commutes with turning planes has one rotation each.
        return None if self.planes else "matrices"

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, self.n, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        return torch.eye(self.n, dtype=torch.float64).repeat(copies, 1, 1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(element)

    def draw(self, generator: torch.Generator | None, special: bool, compact: bool) -> torch.Tensor:
        """The compact part from the Haar measure, stretches log-uniform in `[1/SPREAD, SPREAD]`."""
        if compact:
            return replace(self, stretch="none").draw(generator, special, compact=False)

        def stretches(count: int) -> torch.Tensor:
            return SPREAD ** (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)

        free, rest = self.stretch == "free", self.rest
        element = torch.zeros(self.n, self.n, dtype=torch.float64)
        if self.planes:
            angles = math.pi * (2 * torch.rand(len(self.planes), generator=generator, dtype=torch.float64) - 1)
            element = self.from_planes(angles, stretches(len(self.planes)) if free else torch.ones_like(angles))
        if rest:
            block = haar(len(rest), generator, special=special)
            if free:
                axes = haar(len(rest), generator)
                block = block @ (axes * stretches(len(rest))) @ axes.T
            element[self.block] = block
        if self.stretch == "common":
            element = element * stretches(1)
        if self.movable and not special:
            order = torch.randperm(len(self.planes), generator=generator)
            mirrored = torch.rand(len(self.planes), generator=generator, dtype=torch.float64) < 0.5
            element = self.moved_planes(order, mirrored) @ element
        return element

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        return so_exp(algebra)

    def log(self, element: torch.Tensor) -> torch.Tensor:
        """
        The Lie algebra elements `[copies, n, n]` whose exponentials are `element`.

        Raises:
            ValueError: where there is none, or none that is continuous: determinant -1, planes that changed places,
                or, in GL(n), negative eigenvalues.
        """
        return torch.stack([self._log(matrix) for matrix in element])

    def _log(self, matrix: torch.Tensor) -> torch.Tensor:
        self._check_connected(matrix)
        angles, scales = self.plane_coordinates(matrix)
        first, second = self.pairs
        result = torch.zeros_like(matrix)
        result[first, first] = result[second, second] = scales.log()
        result[second, first], result[first, second] = angles, -angles
        if self.rest:
            block = matrix[self.block]
            if self.stretch == "free":
                with needs("align"):
                    from scipy.linalg import logm

                logarithm = torch.from_numpy(logm(block.numpy()))
                if logarithm.is_complex() and logarithm.imag.abs().max() > 1e-9 * logarithm.abs().max():
                    raise ValueError(
                        "`element` has no real principal logarithm, as it has negative eigenvalues. `path` joins it "
                        "to the identity by another way if its determinant is positive."
                    )
                logarithm = logarithm.real if logarithm.is_complex() else logarithm
            else:
                scale = self.scale(block[None])[0]
                logarithm = so_log(block / scale) + scale.log() * torch.eye(len(self.rest)).double()
            result[self.block] = logarithm
        return result

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        """
        The point at `t` on the path from the identity (`t = 0`) to `element` (`t = 1`): rotate along the geodesic, and
        stretch along the symmetric factor of the polar decomposition meanwhile.
        """
        return torch.stack([self._path(matrix, t) for matrix in element])

    def _path(self, matrix: torch.Tensor, t: float) -> torch.Tensor:
        self._check_connected(matrix)
        angles, scales = self.plane_coordinates(matrix)
        result = self.from_planes(t * angles, scales**t)
        if self.rest:
            u, stretch, vt = torch.linalg.svd(matrix[self.block])
            result[self.block] = so_exp(t * so_log(u @ vt)) @ (vt.T * stretch**t) @ vt
        return result

    def _check_connected(self, matrix: torch.Tensor) -> None:
        if self.movable and not torch.allclose(self.commuting(matrix), matrix):
            raise ValueError(
                "`element` exchanges or mirrors planes, which no path joins to the identity. Draw it with "
                "`special=True`."
            )

    def scale(self, element: torch.Tensor) -> torch.Tensor:
        """The common stretch `[copies]` of elements."""
        return (torch.linalg.slogdet(element).logabsdet / element.shape[-1]).exp()

    def matrices(self, element: torch.Tensor, role: Role) -> torch.Tensor:
        """The factor of a tensor in this role: `[copies, n, n]`, `[copies, 1, 1]` or `[copies, planes, planes]`."""
        match role:
            case "vector":
                return element
            case "covector" if self.stretch == "none":
                return element  # orthogonal: its own inverse transpose
            case "covector":
                return torch.linalg.inv(element).mT
            case "metric":
                scale = self.scale(element) if self.stretch == "common" else torch.ones(len(element)).double()
                return scale.square()[:, None, None]
        first, second = self.pairs  # frequencies
        rows = element[:, first]
        moved = torch.hypot(rows[:, :, first], rows[:, :, second])
        blocks = [element[:, i[:, None], j] for i in (first, second) for j in (first, second)]
        orientation = (blocks[0] * blocks[3] - blocks[1] * blocks[2]).sign()
        return orientation * (moved > 1e-9).double()

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """Turn `[copies · repeats · n, rest]`; the repeats of one copy share its matrix."""
        matrices = self.matrices(element, role).to(tensor)
        return (matrices[:, None] @ self._blocks(tensor, matrices.shape[0], role)).reshape(tensor.shape)

    def _blocks(self, tensor: torch.Tensor, copies: int, role: Role) -> torch.Tensor:
        size = {"metric": 1, "planes": len(self.planes)}.get(role, self.n)
        return tensor.reshape(copies, -1, size, tensor.shape[-1])

    def gram(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """
        `Σ a bᵀ` over everything but the frame, `[copies, n, n]`, of two tensors `[copies · repeats · n, rest]`.

        A metric weight gives `(a·b / n) 1`, so that its trace counts the weight once; frequencies give the products
        `[copies, planes, planes]` of all pairs.
        """
        first = self._blocks(a, copies, role).movedim(1, 2).flatten(2)
        second = first if b is a else self._blocks(b, copies, role).movedim(1, 2).flatten(2)
        if role == "metric":
            weight = (first * second).sum(-1, keepdim=True) / self.n
            return weight * torch.eye(self.n, dtype=a.dtype, device=a.device)
        return first @ second.mT

    def generator(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        """
        From `Σ a bᵀ` by role, the pairing of `a` with the motion of `b` under every generator: `[copies, n, n]`.

        For a generator X vectors move by X b, covectors by -Xᵀ b, metric weights by 2 tr(X)/n b; `<a, motion>` is
        `tr(Xᵀ P)` for the P given here, projected on the Lie algebra.
        """
        total = torch.zeros(())
        for role, value in grams.items():
            match role:
                case "vector":
                    total = total + value
                case "covector":
                    total = total - value.mT
                case "metric":
                    total = total + 2 * value
        return self.project(total)

    def project(self, matrix: torch.Tensor) -> torch.Tensor:
        """The nearest element `[copies, n, n]` of the Lie algebra."""
        commuting = self.commuting(matrix)
        if self.stretch == "free":
            return commuting
        skew = (commuting - commuting.mT) / 2
        if self.stretch == "none":
            return skew
        trace = commuting.diagonal(dim1=-2, dim2=-1).mean(-1)
        return skew + trace[..., None, None] * torch.eye(self.n, dtype=matrix.dtype, device=matrix.device)

    def balance(self, grams: dict[Role, torch.Tensor], unpaired: float = 1.0) -> torch.Tensor:
        vectors, covectors = grams["vector"], grams["covector"]
        if self.stretch == "none":
            return self.identity(len(vectors))
        if self.stretch == "common":
            traces = [grams[role].diagonal(dim1=-2, dim2=-1).sum(-1) for role in ("vector", "covector", "metric")]
            squares = torch.stack(
                [least_norm.common_stretch(q, k, weight, unpaired) for q, k, weight in zip(*traces, strict=True)]
            )
            return self.identity(len(vectors)) * squares.sqrt()[:, None, None]
        return torch.stack([self._balance(*pair, unpaired) for pair in zip(vectors, covectors, strict=True)])

    def _balance(self, vectors: torch.Tensor, covectors: torch.Tensor, unpaired: float) -> torch.Tensor:
        first, second = self.pairs
        both, other = (gram[first, first] + gram[second, second] for gram in (vectors, covectors))
        scales = least_norm.plane_stretches(both, other, unpaired)
        element = self.from_planes(torch.zeros_like(scales), scales)
        if self.rest:
            # The symmetric positive balancing element: it turns nothing, and is near 1 where little is to do.
            balancing = least_norm.contragredient(vectors[self.block], covectors[self.block], unpaired)
            _, stretches, axes = torch.linalg.svd(balancing)
            element[self.block] = (axes.T * stretches) @ axes
        return element

    def decay(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        """As for every group; for Gram matrices A of vectors and B of covectors X solves `XA + BX = B - A`."""
        charge = self.generator(grams)
        vectors, covectors = self.commuting(grams["vector"]), self.commuting(grams["covector"])
        if self.stretch == "common":
            total = vectors + covectors + 4 * grams.get("metric", torch.zeros_like(vectors))
            size = total.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            return torch.where(size > 0, -charge / size, torch.zeros_like(charge))
        # The solution commutes with the rotations of planes, as both sides do.
        return least_norm.sylvester(vectors, covectors, charge)

    def compact(self, element: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(element)
        return left @ right

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        gram = self.commuting(sum(grams[role] for role in ("vector", "covector") if role in grams) / 2)
        return torch.linalg.eigvalsh(gram).flatten()

    def arrange(self, view: View, note: Note) -> torch.Tensor:
        """Learned frequencies positive and descending; of equal ones the plane that carries most comes first."""
        (frequencies,) = [a for role, a, _ in view.pairs() if role == "planes"]
        frequencies = frequencies.reshape(-1, len(self.planes))
        first, second = self.pairs
        strengths = (view.grams["vector"] + view.grams["covector"]).diagonal(dim1=1, dim2=2)
        strengths = strengths[:, first] + strengths[:, second]
        order, mirrored = spectra.order_of_planes(frequencies, strengths, view.key, note)
        return torch.stack([self.moved_planes(*pair) for pair in zip(order, mirrored, strict=True)])

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """The Gram matrix diagonal as far as the group allows, by descending eigenvalue, signs by odd moments."""
        grams, anchors = view.total(), view.anchors()
        around = anchors.reshape(len(anchors), len(grams), self.n).transpose(0, 1)
        return torch.stack([self._orient(*pair, view.key, note) for pair in zip(grams, around, strict=True)])

    def _orient(self, gram: torch.Tensor, anchors: torch.Tensor, key: tuple, note: Note) -> torch.Tensor:
        if not self.planes:
            return spectra.eigenbasis(gram, anchors.contiguous(), key, note)
        first, second = self.pairs
        # The principal axis of each plane becomes its first dimension.
        across, along = 2 * gram[first, second], gram[first, first] - gram[second, second]
        angles = -torch.atan2(across, along) / 2
        # If there is none, the first anchor that has a part in the plane does.
        size = (gram[first, first] + gram[second, second]).clamp_min(1e-300)
        lengths = torch.hypot(anchors[:, first], anchors[:, second])
        leader = (lengths > LEADS * lengths.max().clamp_min(1e-300)).double().argmax(dim=0, keepdim=True)
        leading = [anchors[:, index].gather(0, leader)[0] for index in (first, second)]
        round_one = torch.hypot(across, along) <= DEGENERATE * size
        angles = torch.where(round_one, -torch.atan2(leading[1], leading[0]), angles)
        element = self.from_planes(angles, torch.ones_like(angles))
        gap = float((torch.hypot(across, along) / size).min())
        note("planes", gap, DEGENERATE, f"a plane of {key} has no principal axis")
        moments = spectra.odd_moments((anchors @ element.T)[:, first])
        note("signs", float(moments.abs().min()), UNSIGNED, f"the sign of a plane of {key}")
        turn = spectra.signs(moments)
        element[first], element[second] = turn[:, None] * element[first], turn[:, None] * element[second]
        if self.rest:
            element[self.block] = spectra.eigenbasis(gram[self.block], anchors[:, self.block[1]], key, note)
        return element

    def nearest(self, view: View) -> torch.Tensor:
        return self.procrustes(view.total().double(), view.grams.get("planes") if self.movable else None)

    def procrustes(self, cross: torch.Tensor, frequencies: torch.Tensor | None = None) -> torch.Tensor:
        """
        The rotations, reflections and exchanges `R` `[copies, n, n]` in the group that make `tr(Rᵀ C)` largest.

        For `C = Σ b aᵀ` this brings the vectors a nearest to b. For O(n) it is the polar factor of C (Schönemann
        1966), for a plane the angle of its rotation part; planes that may change places are assigned to each other.

        Args:
            cross: `C` `[copies, n, n]`.
            frequencies: `Σ b aᵀ` `[copies, planes, planes]` of the planes' frequencies, where these are learned.
        """
        spare = [None] * len(cross) if frequencies is None else list(frequencies)
        return torch.stack([self._procrustes(*pair) for pair in zip(cross, spare, strict=True)])

    def _procrustes(self, cross: torch.Tensor, frequencies: torch.Tensor | None) -> torch.Tensor:
        moved = self.identity()[0]
        if self.movable:
            kept, mirrored = self.plane_gains(cross)
            offset = torch.zeros_like(kept) if frequencies is None else frequencies
            kept, mirrored = kept + offset, mirrored - offset
            order = assignment(torch.maximum(kept, mirrored))
            moved = self.moved_planes(order, (mirrored > kept).gather(1, order[:, None])[:, 0])
            cross = cross @ moved.T
        first, second = self.pairs
        angles = torch.atan2(cross[second, first] - cross[first, second], cross[first, first] + cross[second, second])
        element = self.from_planes(angles, torch.ones_like(angles))
        if self.rest:
            u, _, vt = torch.linalg.svd(cross[self.block])
            element[self.block] = u @ vt
        return element @ moved

    def largest_trace(self, cross: torch.Tensor) -> torch.Tensor:
        gain = torch.zeros(cross.shape[:-2], dtype=cross.dtype)
        if self.planes:
            kept, mirrored = self.plane_gains(cross)
            if self.movable:
                flat = torch.maximum(kept, mirrored).reshape(-1, *kept.shape[-2:])
                best = [gains.gather(1, assignment(gains)[:, None]).sum() for gains in flat]
                gain = gain + torch.stack(best).reshape(gain.shape)
            else:
                gain = gain + kept.diagonal(dim1=-2, dim2=-1).sum(-1)
        if self.rest:
            gain = gain + torch.linalg.svdvals(cross[..., *self.block]).sum(-1)
        return gain


def orthogonal(n: int) -> MatrixGroup:
    """O(n): rotations and reflections."""
    return MatrixGroup(n, "none")


def general_linear(n: int) -> MatrixGroup:
    """GL(n): every invertible matrix."""
    return MatrixGroup(n, "free")
