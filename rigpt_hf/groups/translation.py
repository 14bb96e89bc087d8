"""Constant vectors added to parameters where nothing can see them. The table of frames says to which, and how."""

from dataclasses import dataclass

import torch

from .base import Group


@dataclass(frozen=True)
class Translations(Group):
    """
    Vectors `[copies, n]`, zero outside of the `free` dimensions.

    Args:
        n: Length of the vectors.
        free: The dimensions that may move; all if absent.
    """

    n: int
    free: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"R^{self.dimension}"

    @property
    def dimension(self) -> int:  # type: ignore[override]
        return self.n if self.free is None else len(self.free)

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        return torch.zeros(copies, self.n, dtype=torch.float64)

    def project(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` `[copies, n]` with zeros where nothing may move."""
        if self.free is None:
            return matrix
        kept = torch.zeros(self.n, dtype=matrix.dtype, device=matrix.device)
        kept[list(self.free)] = 1
        return matrix * kept

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        return -element

    def random(
        self,
        copies: int = 1,
        generator: torch.Generator | None = None,
        special: bool = False,
        compact: bool = False,
    ) -> torch.Tensor:
        """Gaussian; `compact`: none, as lengths change."""
        if compact:
            return self.identity(copies)
        return self.project(torch.randn(copies, self.n, generator=generator, dtype=torch.float64))

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        return algebra

    def log(self, element: torch.Tensor) -> torch.Tensor:
        return element

    def compact(self, element: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(element)
