"""The planes of a head that rotary positions turn: matrices that are one rotation and stretch per plane."""

from collections.abc import Sequence
from functools import cached_property

import torch


class Planes:
    """Matrices `[n, n]` with respect to `planes`, disjoint pairs of dimensions, and the dimensions outside of them."""

    n: int
    planes: tuple[tuple[int, int], ...]

    @cached_property
    def rest(self) -> list[int]:
        """Dimensions outside of all planes."""
        turned = {index for plane in self.planes for index in plane}
        return [index for index in range(self.n) if index not in turned]

    @cached_property
    def block(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The index of the block of a matrix outside of all planes."""
        index = torch.tensor(self.rest)
        return index[:, None], index

    @cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First and second dimensions of the planes."""
        return torch.tensor([i for i, _ in self.planes]).long(), torch.tensor([j for _, j in self.planes]).long()

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
        matrix = torch.eye(self.n, dtype=torch.float64)
        rows = matrix[second][order]
        matrix[first] = matrix[first][order]
        matrix[second] = torch.where(mirrored, -1.0, 1.0)[:, None] * rows
        return matrix

    def plane_coordinates(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angle and stretch of every plane."""
        first, second = self.pairs
        cos, sin = matrix[first, first], matrix[second, first]
        return torch.atan2(sin, cos), torch.hypot(cos, sin)

    def commuting(self, matrix: torch.Tensor) -> torch.Tensor:
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
            result[..., *self.block] = matrix[..., *self.block]
        return result

    def plane_gains(self, cross: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each pair of planes `[..., planes, planes]` the gain of the best rotation and of the best reflection."""
        first, second = self.pairs
        ii, ij, ji, jj = (cross[..., a[:, None], b] for a in (first, second) for b in (first, second))
        return torch.hypot(ii + jj, ji - ij), torch.hypot(ii - jj, ji + ij)

    def gather(self, values: torch.Tensor, of: Sequence[int] = (0, 1)) -> torch.Tensor:
        """
        One number per plane, then one per dimension outside of them, `[..., planes + rest]`, of `[..., n]`: the sum
        over both dimensions of a plane, or the value in one of them.
        """
        return torch.cat([sum(values[..., self.pairs[i]] for i in of), values[..., self.rest]], dim=-1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The same number in both dimensions of a plane, `[..., n]` of `[..., planes + rest]`."""
        result = values.new_zeros(*values.shape[:-1], self.n)
        for index in self.pairs:
            result[..., index] = values[..., : len(self.planes)]
        result[..., self.rest] = values[..., len(self.planes) :]
        return result
