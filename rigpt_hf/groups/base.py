"""The interface of every group, whatever its elements are; frames (`rigpt_hf/frames.py`) know groups by it alone."""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch


Role = str
# Singular values of random elements lie in [1/SPREAD, SPREAD]: not orthogonal, well conditioned.
SPREAD = 2.0
# Eigenvalues (relative to the largest) and sorting keys (relative) closer than this count as equal.
DEGENERATE = 1e-9
# An odd moment this small decides no sign.
UNSIGNED = 1e-9
# Takes a kind of decision, how clear it was, how clear it must be, and what to say if it was not.
Note = Callable[[str, float, float, str], None]
Pairs = Iterator[tuple[Role, torch.Tensor, torch.Tensor]]


class View(Protocol):
    """Two sets of weights `a` and `b` as a frame sees them; see `rigpt_hf/symmetry/contraction.py`."""

    @property
    def key(self) -> tuple: ...

    @property
    def grams(self) -> dict[Role, torch.Tensor]: ...

    def total(self) -> torch.Tensor: ...

    def anchors(self) -> torch.Tensor: ...

    def pairs(self) -> Pairs: ...

    def carried(self) -> "list[tuple[Group, list[tuple[Role, torch.Tensor, torch.Tensor]]]]": ...


class Group:
    """
    A group that may act on a frame. Elements are stacks over the copies of the frame; algebra is done in float64, on
    the CPU. Weights may be elsewhere: [`act`] brings elements to them, [`nearest`] what it sums to the CPU.

    What a group leaves out here it has not: without stretches there is nothing to balance and nothing conserved,
    without a path between its elements no Lie algebra.
    """

    # Dimension of the Lie algebra, per copy.
    dimension: int = 0
    # Elements change lengths; exchange heads or neurons; exchange planes of rotation.
    stretches: bool = False
    exchanges: bool = False
    movable: bool = False
    # What a finite group may be represented by in it: permutations, orthogonal matrices, or nothing but the identity.
    represents: Literal["permutations", "matrices"] | None = None
    dtype = torch.float64

    def shape(self, copies: int) -> tuple[int, ...]:
        """Shape of a stack of elements."""
        raise NotImplementedError

    def identity(self, copies: int = 1) -> torch.Tensor:
        """The stack of elements that change nothing."""
        raise NotImplementedError

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """First `b`, then `a`."""
        raise NotImplementedError

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        """The stack of inverses."""
        raise NotImplementedError

    def representing(self, actions: torch.Tensor) -> torch.Tensor:
        """The elements that act by permutations `[copies, n]`, from `i` to `p[i]`, or by matrices `[copies, n, n]`."""
        return actions

    def random(
        self,
        copies: int = 1,
        generator: torch.Generator | None = None,
        special: bool = False,
        compact: bool = False,
    ) -> torch.Tensor:
        """
        Random elements; `special`: only such that a path joins to the identity; `compact`: such that keep all lengths.
        """
        return torch.stack([self.draw(generator, special, compact) for _ in range(copies)])

    def draw(self, generator: torch.Generator | None, special: bool, compact: bool) -> torch.Tensor:
        """One random element, without the axis of copies."""
        raise NotImplementedError

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        """Elements from the Lie algebra."""
        raise NotImplementedError

    def log(self, element: torch.Tensor) -> torch.Tensor:
        """The inverse of [`exp`]; a `ValueError` where there is none."""
        raise NotImplementedError

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        """The point at `t` of a path from the identity to `element`; a `ValueError` where there is none."""
        return self.exp(t * self.log(element))

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """An axis in this role, first in `[length, rest]`, after the transformation."""
        raise NotImplementedError

    def gram(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`Σ a bᵀ` over everything but the frame, of two tensors `[length, rest]`."""
        raise NotImplementedError

    def count(self, role: Role) -> int:
        """The number of heads or neurons along an axis in this role."""
        raise NotImplementedError

    def exponents(self, role: Role) -> torch.Tensor:
        """Powers of the scalings of a neuron by which an axis in this role scales."""
        raise NotImplementedError

    def order_of_copies(self, element: torch.Tensor, role: Role) -> torch.Tensor:
        """The order `[copies]` from which an exchange takes the copies of a frame that it carries in this role."""
        raise NotImplementedError

    def reordered(self, element: torch.Tensor, order: Callable[[Role], torch.Tensor], role: Role) -> torch.Tensor:
        """A stack of elements of copies that are carried in `role`, in the order of an exchange of heads by roles."""
        return element[order(role)]

    def generator(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        """
        From `Σ a bᵀ` by role, the pairing of `a` with the motion of `b` under every generator, in the Lie algebra: for
        weights twice, the charges that gradient flow conserves.
        """
        raise NotImplementedError

    def balance(self, grams: dict[Role, torch.Tensor], unpaired: float = 1.0) -> torch.Tensor:
        """Elements after which the charges of weights with these Gram matrices are zero."""
        raise NotImplementedError

    def decay(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        """
        The stretches X in the Lie algebra for which `Xθ` is the projection of `-θ` on all their directions: they solve
        `<Yθ, Xθ> = -<Yθ, θ>` for every Y.
        """
        raise NotImplementedError

    def arrange(self, view: View, note: Note) -> torch.Tensor:
        """The exchange of planes that a canonical form begins with."""
        raise NotImplementedError

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """The element that keeps lengths and makes balanced weights canonical in this frame."""
        raise NotImplementedError

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        """Invariants of balanced weights, in any order."""
        raise NotImplementedError

    def nearest(self, view: View) -> torch.Tensor:
        """The element that keeps lengths and brings `b` nearest to `a`."""
        raise NotImplementedError

    def procrustes(self, cross: torch.Tensor, frequencies: torch.Tensor | None = None) -> torch.Tensor:
        """The rotations `R` `[copies, n, n]` that make `tr(Rᵀ C)` largest for `C` `[copies, n, n]`."""
        raise NotImplementedError

    def largest_trace(self, cross: torch.Tensor) -> torch.Tensor:
        """The largest `tr(Rᵀ C)` itself, `[...]` for `C` `[..., n, n]`: what matching these vectors can gain."""
        raise NotImplementedError

    def compact(self, element: torch.Tensor) -> torch.Tensor:
        """The nearest element that keeps all lengths."""
        return element

    def project(self, matrix: torch.Tensor) -> torch.Tensor:
        """The nearest element of the Lie algebra."""
        raise NotImplementedError
