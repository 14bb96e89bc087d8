"""
Groups that exchange things: attention heads, and neurons with the scalings their activation allows.

They have the methods of [`MatrixGroup`], other elements and other roles, and no Lie algebra but that of the scalings.
A permutation is kept as the list of where to take from: `(P x)[i] = x[p[i]]`.
"""

from dataclasses import dataclass

import torch

from .groups import SPREAD, Role


@dataclass(frozen=True)
class HeadPermutations:
    """
    Permutations of key-value heads, and of the query heads that share one.

    Elements are `[1, H]`, indices of query heads. Roles: `query` for axes of length `H · something`, `key_value` for
    axes of length `K · something`.

    Args:
        key_value_heads: Their number `K`.
        repeats: Query heads per key-value head, `H / K`.
    """

    key_value_heads: int
    repeats: int

    def __str__(self) -> str:
        return f"S{self.repeats} wr S{self.key_value_heads}" if self.repeats > 1 else f"S{self.key_value_heads}"

    dimension = 0

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, self.key_value_heads * self.repeats)

    def identity(self, copies: int = 1) -> torch.Tensor:
        return torch.arange(self.key_value_heads * self.repeats).repeat(copies, 1)

    def from_parts(self, heads: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """The element `[1, H]` that takes key-value heads from `heads` `[K]`, and in each query heads by `inside`."""
        return (heads[:, None] * self.repeats + inside).reshape(1, -1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return b.gather(1, a)

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        return element.argsort(dim=1)

    def random(
        self,
        copies: int = 1,
        generator: torch.Generator | None = None,
        special: bool = False,
        compact: bool = False,
    ) -> torch.Tensor:
        """Uniform; `special`: the identity, as nothing else is joined to it by a path."""
        if special:
            return self.identity(copies)
        elements = []
        for _ in range(copies):
            heads = torch.randperm(self.key_value_heads, generator=generator)
            inside = [torch.randperm(self.repeats, generator=generator) for _ in heads]
            elements.append(self.from_parts(heads, torch.stack(inside)))
        return torch.cat(elements)

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        return self.identity(len(algebra))

    def log(self, element: torch.Tensor) -> torch.Tensor:
        self._check_connected(element)
        return torch.zeros(len(element), 0, dtype=torch.float64)

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        self._check_connected(element)
        return element

    def _check_connected(self, element: torch.Tensor) -> None:
        if not torch.equal(element, self.identity(len(element))):
            raise ValueError(
                "`element` exchanges heads, which no path joins to the identity. Draw it with `special=True`."
            )

    def key_value(self, element: torch.Tensor) -> torch.Tensor:
        """Where each key-value head is taken from, `[K]`."""
        return element[0, :: self.repeats] // self.repeats

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange the blocks of `[heads · size, rest]`."""
        order = (element[0] if role == "query" else self.key_value(element)).to(tensor.device)
        return tensor.reshape(len(order), -1)[order].reshape(tensor.shape)

    def contract(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`a·b` per head, `[1, H]` or `[1, K]`, of two tensors `[heads · size, rest]`."""
        heads = self.key_value_heads * (self.repeats if role == "query" else 1)
        return (a * b).reshape(heads, -1).sum(-1)[None]


@dataclass(frozen=True)
class NeuronGroup:
    """
    Permutations of neurons, each with a scaling first: of what enters the activation, and of what is multiplied to it.

    Where `act(a z) = a^p act(z)` for `a > 0`, the rows that enter it may be scaled by `a` and the column that reads it
    by `a^-p`; the linear factor of a gated MLP by any `b ≠ 0` and the column by `1/b`. Elements are `[1, 3, F]`:
    indices, `a`, `b`. Roles: `active`, `linear`, `down`.

    Args:
        n: Neurons `F`.
        degree: `p`, or `None` where the activation allows no scaling.
        gated: Whether there is a linear factor.
    """

    n: int
    degree: int | None = None
    gated: bool = False

    def __str__(self) -> str:
        scales = ["R+"] * (self.degree is not None) + ["R*"] * self.gated
        return " x ".join([f"S{self.n}", *(f"({scale})^{self.n}" for scale in scales)])

    @property
    def allowed(self) -> torch.Tensor:
        """Which of the two scalings exist, `[2]`."""
        return torch.tensor([self.degree is not None, self.gated])

    @property
    def dimension(self) -> int:
        """Dimension of the Lie algebra: one per neuron and scaling."""
        return self.n * int(self.allowed.sum())

    def exponents(self, role: Role) -> torch.Tensor:
        """Powers of `a` and `b`, `[2]`, by which an axis in this role scales."""
        powers = {"active": (1, 0), "linear": (0, 1), "down": (-(self.degree or 0), -1)}[role]
        return torch.tensor(powers, dtype=torch.float64) * self.allowed

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, 3, self.n)

    def element(self, order: torch.Tensor, active: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """`[1, 3, F]` from indices and the two scalings, each `[F]`."""
        return torch.stack([order.double(), active.double(), linear.double()])[None]

    def identity(self, copies: int = 1) -> torch.Tensor:
        ones = torch.ones(self.n)
        return self.element(torch.arange(self.n), ones, ones).repeat(copies, 1, 1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        first, second = b[:, 0].long(), a[:, 0].long()
        undo = first.argsort(dim=1)[:, None].expand(-1, 2, -1)
        return torch.cat([b[:, :1].gather(2, second[:, None]), a[:, 1:].gather(2, undo) * b[:, 1:]], dim=1)

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        order = element[:, 0].long()
        scales = (1 / element[:, 1:]).gather(2, order[:, None].expand(-1, 2, -1))
        return torch.cat([order.argsort(dim=1)[:, None].double(), scales], dim=1)

    def random(
        self,
        copies: int = 1,
        generator: torch.Generator | None = None,
        special: bool = False,
        compact: bool = False,
    ) -> torch.Tensor:
        """
        Uniform permutations, scalings log-uniform in `[1/SPREAD, SPREAD]`; `special`: no exchange, no sign; `compact`:
        no scaling but signs.
        """
        elements = []
        for _ in range(copies):
            order = torch.arange(self.n) if special else torch.randperm(self.n, generator=generator)
            draws = 2 * torch.rand(3, self.n, generator=generator, dtype=torch.float64) - 1
            scales = torch.where(self.allowed[:, None] & (not compact), SPREAD ** draws[:2], 1.0)
            if self.gated and not special:
                scales[1] *= draws[2].sign()
            elements.append(self.element(order, *scales))
        return torch.cat(elements)

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        """Elements from logarithms of the scalings, `[copies, 2, F]`."""
        return torch.cat([self.identity(len(algebra))[:, :1], algebra.exp()], dim=1)

    def log(self, element: torch.Tensor) -> torch.Tensor:
        self._check_connected(element)
        return element[:, 1:].log()

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        return self.exp(t * self.log(element))

    def _check_connected(self, element: torch.Tensor) -> None:
        if not torch.equal(element[:, 0], self.identity(len(element))[:, 0]) or (element[:, 1:] <= 0).any():
            raise ValueError(
                "`element` exchanges neurons or turns their sign, which no path joins to the identity. Draw it with "
                "`special=True`."
            )

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """Scale and exchange the rows of `[F, rest]`."""
        element = element[0].to(tensor.device)
        powers = self.exponents(role).to(tensor.device)
        scale = (element[1:] ** powers[:, None]).prod(dim=0)
        return (scale[:, None].to(tensor) * tensor)[element[0].long()]

    def contract(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`a·b` per neuron, `[1, F]`, of two tensors `[F, rest]`."""
        return (a * b).sum(-1)[None]

    def generator(self, contractions: dict[Role, torch.Tensor]) -> torch.Tensor:
        """From `a·b` by role, the pairing of `a` with the motion of `b` under every scaling: `[1, 2, F]`."""
        return sum(self.exponents(role)[:, None] * value for role, value in contractions.items())[None]


@dataclass(frozen=True)
class Translations:
    """
    Constant vectors added where nothing can see them, `[copies, n]`; zero outside of the `free` dimensions.

    Args:
        n: Length of the vectors.
        free: The dimensions that may move; all if absent.
    """

    n: int
    free: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"R^{self.dimension}"

    @property
    def dimension(self) -> int:
        """Dimension of the Lie algebra."""
        return self.n if self.free is None else len(self.free)

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        return torch.zeros(copies, self.n, dtype=torch.float64)

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """`vectors` `[copies, n]` with zeros where nothing may move."""
        if self.free is None:
            return vectors
        kept = torch.zeros(self.n, dtype=vectors.dtype, device=vectors.device)
        kept[list(self.free)] = 1
        return vectors * kept

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

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        return t * element
