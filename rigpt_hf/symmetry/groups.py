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
from dataclasses import dataclass, field, replace
from typing import Literal

import scipy.linalg
import scipy.optimize
import torch

from .rotations import haar, so_exp, so_log


Role = str
Stretch = Literal["none", "common", "free"]
# Singular values of random elements lie in [1/SPREAD, SPREAD]: not orthogonal, well conditioned.
SPREAD = 2.0


@dataclass(frozen=True)
class MatrixGroup:
    """
    A group of matrices `[n, n]`, see the head of this file.

    Args:
        n: Size of the matrices.
        stretch: Which symmetric positive factors are allowed besides rotations.
        planes: Pairs of dimensions with a rotation of their own that the group must commute with.
        movable: Whether planes may be exchanged and mirrored, as their frequencies are parameters too.
    """

    n: int
    stretch: Stretch = "none"
    planes: tuple[tuple[int, int], ...] = ()
    movable: bool = field(default=False)

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
    def rest(self) -> list[int]:
        """Dimensions outside of all planes."""
        turned = {index for plane in self.planes for index in plane}
        return [index for index in range(self.n) if index not in turned]

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First and second dimensions of the planes."""
        return torch.tensor([i for i, _ in self.planes]).long(), torch.tensor([j for _, j in self.planes]).long()

    @property
    def dimension(self) -> int:
        """Dimension of the Lie algebra."""
        rest, planes = len(self.rest), len(self.planes)
        turns = rest * (rest - 1) // 2 + planes
        return turns + {"none": 0, "common": 1, "free": rest * (rest + 1) // 2 + planes}[self.stretch]

    def shape(self, copies: int) -> tuple[int, ...]:
        """Shape of a stack of elements."""
        return (copies, self.n, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        """The stack of elements that change nothing."""
        return torch.eye(self.n, dtype=torch.float64).repeat(copies, 1, 1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """First `b`, then `a`."""
        return a @ b

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        """The stack of inverses."""
        return torch.linalg.inv(element)

    def random(
        self,
        copies: int = 1,
        generator: torch.Generator | None = None,
        special: bool = False,
        compact: bool = False,
    ) -> torch.Tensor:
        """
        Random elements: the compact part from the Haar measure, stretches log-uniform in `[1/SPREAD, SPREAD]`.

        `special`: only such that a path joins to the identity; `compact`: only such that keep all lengths.
        """
        group = replace(self, stretch="none") if compact else self
        return torch.stack([group._random(generator, special) for _ in range(copies)])

    def _random(self, generator: torch.Generator | None, special: bool) -> torch.Tensor:
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
            element[torch.tensor(rest)[:, None], torch.tensor(rest)] = block
        if self.stretch == "common":
            element = element * stretches(1)
        if self.movable and not special:
            order = torch.randperm(len(self.planes), generator=generator)
            mirrored = torch.rand(len(self.planes), generator=generator, dtype=torch.float64) < 0.5
            element = self.moved_planes(order, mirrored) @ element
        return element

    def from_planes(self, angles: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """`[n, n]`: turn and stretch every plane, and the identity outside of them."""
        first, second = self.pairs
        matrix = torch.eye(self.n, dtype=torch.float64)
        cos, sin = scales * angles.cos(), scales * angles.sin()
        matrix[first, first], matrix[second, second] = cos, cos
        matrix[second, first], matrix[first, second] = sin, -sin
        return matrix

    def moved_planes(self, order: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        """`[n, n]`: plane i of the result is plane `order[i]`, its second axis turned round where `mirrored[i]`."""
        first, second = self.pairs
        matrix = self.identity()[0]
        matrix[first] = matrix[first][order]
        matrix[second] = torch.where(mirrored, -1.0, 1.0)[:, None] * self.identity()[0][second][order]
        return matrix

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        """Elements `[copies, n, n]` from the Lie algebra."""
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
        angles, scales = self._plane_coordinates(matrix)
        first, second = self.pairs
        result = torch.zeros_like(matrix)
        result[first, first] = result[second, second] = scales.log()
        result[second, first], result[first, second] = angles, -angles
        rest = self.rest
        if rest:
            index = torch.tensor(rest)
            block = matrix[index[:, None], index]
            if self.stretch == "free":
                logarithm = torch.from_numpy(scipy.linalg.logm(block.numpy()))
                if logarithm.is_complex() and logarithm.imag.abs().max() > 1e-9 * logarithm.abs().max():
                    raise ValueError(
                        "`element` has no real principal logarithm, as it has negative eigenvalues. `path` joins it "
                        "to the identity by another way if its determinant is positive."
                    )
                logarithm = logarithm.real if logarithm.is_complex() else logarithm
            else:
                scale = self.scale(block[None])[0]
                logarithm = so_log(block / scale) + scale.log() * torch.eye(len(rest), dtype=torch.float64)
            result[index[:, None], index] = logarithm
        return result

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        """
        The point at `t` on the path from the identity (`t = 0`) to `element` (`t = 1`): rotate along the geodesic, and
        stretch along the symmetric factor of the polar decomposition meanwhile.

        Raises:
            ValueError: if an element is not joined to the identity.
        """
        return torch.stack([self._path(matrix, t) for matrix in element])

    def _path(self, matrix: torch.Tensor, t: float) -> torch.Tensor:
        self._check_connected(matrix)
        angles, scales = self._plane_coordinates(matrix)
        result = self.from_planes(t * angles, scales**t)
        rest = self.rest
        if rest:
            index = torch.tensor(rest)
            u, stretch, vt = torch.linalg.svd(matrix[index[:, None], index])
            result[index[:, None], index] = so_exp(t * so_log(u @ vt)) @ (vt.T * stretch**t) @ vt
        return result

    def _plane_coordinates(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angle and stretch of every plane."""
        first, second = self.pairs
        cos, sin = matrix[first, first], matrix[second, first]
        return torch.atan2(sin, cos), torch.hypot(cos, sin)

    def _check_connected(self, matrix: torch.Tensor) -> None:
        if self.movable and not torch.allclose(self._commuting(matrix), matrix):
            raise ValueError(
                "`element` exchanges or mirrors planes, which no path joins to the identity. Draw it with "
                "`special=True`."
            )

    def scale(self, element: torch.Tensor) -> torch.Tensor:
        """The common stretch `[copies]` of elements."""
        return (torch.linalg.slogdet(element).logabsdet / element.shape[-1]).exp()

    def matrices(self, element: torch.Tensor, role: Role) -> torch.Tensor:
        """What multiplies a tensor in this role: `[copies, n, n]`, `[copies, 1, 1]` or `[copies, planes, planes]`."""
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

    def contract(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """
        `Σ a bᵀ` over everything but the frame, `[copies, n, n]`, of two tensors `[copies · repeats · n, rest]`.

        A metric weight gives `(a·b / n) 1`, so that its trace counts the weight once; frequencies give the products
        `[copies, planes, planes]` of all pairs.
        """
        blocks = [self._blocks(tensor, copies, role).movedim(1, 2).flatten(2) for tensor in (a, b)]
        if role == "metric":
            weight = (blocks[0] * blocks[1]).sum(-1, keepdim=True) / self.n
            return weight * torch.eye(self.n, dtype=a.dtype, device=a.device)
        return blocks[0] @ blocks[1].mT

    def generator(self, contractions: dict[Role, torch.Tensor]) -> torch.Tensor:
        """
        From `Σ a bᵀ` by role, the pairing of `a` with the motion of `b` under every generator: `[copies, n, n]`.

        For a generator X vectors move by X b, covectors by -Xᵀ b, metric weights by 2 tr(X)/n b; `<a, motion>` is
        `tr(Xᵀ P)` for the P given here, projected on the Lie algebra.
        """
        total = torch.zeros(())
        for role, value in contractions.items():
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
        commuting = self._commuting(matrix)
        if self.stretch == "free":
            return commuting
        skew = (commuting - commuting.mT) / 2
        if self.stretch == "none":
            return skew
        trace = commuting.diagonal(dim1=-2, dim2=-1).mean(-1)
        return skew + trace[..., None, None] * torch.eye(self.n, dtype=matrix.dtype, device=matrix.device)

    def symmetric(self, matrix: torch.Tensor) -> torch.Tensor:
        """The part `[copies, n, n]` of a symmetric matrix that commutes with the rotations of the planes."""
        return self._commuting(matrix)

    def _commuting(self, matrix: torch.Tensor) -> torch.Tensor:
        """The part that commutes with the rotations of the planes."""
        if not self.planes:
            return matrix
        first, second = self.pairs
        result = torch.zeros_like(matrix)
        cos = (matrix[..., first, first] + matrix[..., second, second]) / 2
        sin = (matrix[..., second, first] - matrix[..., first, second]) / 2
        result[..., first, first] = result[..., second, second] = cos
        result[..., second, first], result[..., first, second] = sin, -sin
        if self.rest:
            rest = torch.tensor(self.rest)
            result[..., rest[:, None], rest] = matrix[..., rest[:, None], rest]
        return result


def orthogonal(n: int) -> MatrixGroup:
    """O(n): rotations and reflections."""
    return MatrixGroup(n, "none")


def general_linear(n: int) -> MatrixGroup:
    """GL(n): every invertible matrix."""
    return MatrixGroup(n, "free")
