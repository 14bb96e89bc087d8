"""
Groups that exchange things: attention heads, and neurons with the scalings their activation allows.

They have no Lie algebra but that of the scalings. A permutation is kept as the list of where to take from:
`(P x)[i] = x[p[i]]`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from ..extras import needs
from . import spectra
from .base import SPREAD, UNSIGNED, Group, Note, Role, View
from .least_norm import EMPTY, or_one


@dataclass(frozen=True)
class HeadPermutations(Group):
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

    exchanges = True
    dtype = torch.int64
    exchanged = "heads"

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

    def draw(self, generator: torch.Generator | None, special: bool, compact: bool) -> torch.Tensor:
        """Uniform; `special`: the identity, as nothing else is joined to it by a path."""
        if special:
            return self.identity()[0]
        heads = torch.randperm(self.key_value_heads, generator=generator)
        inside = [torch.randperm(self.repeats, generator=generator) for _ in heads]
        return self.from_parts(heads, torch.stack(inside))[0]

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
                f"`element` exchanges {self.exchanged}, which no path joins to the identity. Draw it with "
                "`special=True`."
            )

    def count(self, role: Role) -> int:
        return self.key_value_heads * (self.repeats if role == "query" else 1)

    def order_of_copies(self, element: torch.Tensor, role: Role = "key_value") -> torch.Tensor:
        """The order of heads, `[H]` or `[K]`."""
        return element[0] if role == "query" else element[0, :: self.repeats] // self.repeats

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange the blocks of `[heads · size, rest]`."""
        order = self.order_of_copies(element, role).to(tensor.device)
        return tensor.reshape(len(order), -1)[order].reshape(tensor.shape)

    def gram(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`a·b` per head, `[1, H]` or `[1, K]`."""
        return (a * b).reshape(self.count(role), -1).sum(-1)[None]

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        return grams["query"].flatten()

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """By descending norm, key-value heads with all that is in them."""
        norms, cubes = view.grams, sums_of_cubes(self, view)
        queries = norms["query"][0].reshape(self.key_value_heads, self.repeats)
        second = cubes["query"].reshape(queries.shape)
        strengths, shared = norms["key_value"][0] + queries.sum(dim=1), cubes["key_value"] + second.sum(dim=1)
        heads = spectra.descending(strengths, shared, view.key, note)
        pairs = zip(queries[heads], second[heads], strict=True)
        return self.from_parts(heads, torch.stack([spectra.descending(*pair, view.key, note) for pair in pairs]))

    def nearest(self, view: View) -> torch.Tensor:
        """
        The permutation of heads that gains most once each pair is rotated into each other.

        The gain of a pair of key-value heads is exact; which query heads inside them belong together is judged before
        by the products of queries and keys, and of values and outputs, which no rotation changes.
        """
        heads, repeats = self.key_value_heads, self.repeats
        spaces = [(group, *self._cross(group.shape(1)[-1], pairs)) for group, pairs in view.carried()]
        inside = torch.arange(repeats).repeat(heads, heads, 1)
        if repeats > 1:
            likeness = torch.zeros(heads, heads, repeats, repeats, dtype=spaces[0][1].dtype)
            for _, shared, queries in spaces:
                part = torch.einsum("klij,kglmij->klgm", shared, queries)
                likeness += part / part.abs().max().clamp_min(torch.finfo(part.dtype).tiny)
            inside = torch.stack([torch.stack([assignment(gains) for gains in rows]) for rows in likeness])
        gains = torch.zeros(heads, heads, dtype=spaces[0][1].dtype)
        for group, shared, queries in spaces:
            index = inside[:, :, :, None, None, None].expand(*inside.shape, 1, *shared.shape[-2:])
            chosen = queries.permute(0, 2, 1, 3, 4, 5).gather(3, index)[:, :, :, 0].sum(2)
            gains += group.largest_trace(shared + chosen)
        order = assignment(gains)
        return self.from_parts(order, inside[torch.arange(heads), order])

    def _cross(self, size: int, pairs: list) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `Σ b aᵀ` between all pairs of heads of `size`: of what key-value heads carry `[K, K, n, n]`, of what query
        heads carry `[K, G, K, G, n, n]`.
        """
        heads, repeats, dtype = self.key_value_heads, self.repeats, pairs[0][1].dtype
        shared = torch.zeros(heads, heads, size, size, dtype=dtype)
        queries = torch.zeros(heads, repeats, heads, repeats, size, size, dtype=dtype)
        for role, b, a in pairs:
            cross = (b @ a.T).cpu()
            if role == "query":
                blocks = cross.reshape(heads, repeats, size, heads, repeats, size)
                queries += blocks.permute(0, 1, 3, 4, 2, 5)
            else:
                shared += cross.reshape(heads, size, heads, size).transpose(1, 2)
        return shared, queries


class ExpertPermutations(HeadPermutations):
    """
    Permutations of experts, as of key-value heads that one query head each shares; `[1, E]`.

    Roles: `router`, and those of [`NeuronGroup`]; every axis has as many blocks as there are experts.
    """

    exchanged = "experts"

    def count(self, role: Role) -> int:
        return self.key_value_heads

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        return sum(grams.values()).flatten()

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """By descending norm."""
        cubes = sum(sums_of_cubes(self, view).values())
        return spectra.descending(sum(view.grams.values())[0], cubes, view.key, note)[None]

    def nearest(self, view: View) -> torch.Tensor:
        """The permutation of experts that gains most once the neurons of each pair are matched with each other."""
        count = self.key_value_heads
        gains = torch.zeros(count, count)
        for role, b, a in view.pairs():
            if role == "router":
                gains += (b.float() @ a.float().T).cpu()
        for group, pairs in view.carried():
            assert isinstance(group, NeuronGroup)
            blocks = group.blocks(pairs)
            for i, j in product(range(count), repeat=2):
                fixed, signed = group.likeness([(role, b[i], a[j]) for role, b, a in blocks])
                likeness = fixed + signed.abs()
                gains[i, j] += likeness.gather(1, assignment(likeness)[:, None]).sum()
        return assignment(gains)[None]


@dataclass(frozen=True)
class NeuronGroup(Group):
    """
    Permutations of neurons, each with a scaling first: of what enters the activation, and of what is multiplied to it.

    Where `act(a z) = a^p act(z)` for `a > 0`, the rows that enter it may be scaled by `a` and the column that reads it
    by `a^-p`; the linear factor of a gated MLP by any `b ≠ 0` and the column by `1/b`. Elements are `[copies, 3, F]`,
    a copy for each expert: indices, `a`, `b`. Roles: `active`, `linear`, `down`.

    Args:
        n: Neurons `F`.
        degree: `p`, or `None` where the activation allows no scaling.
        gated: There is a linear factor.
    """

    n: int
    degree: int | None = None
    gated: bool = False

    def __str__(self) -> str:
        scales = ["R+"] * (self.degree is not None) + ["R*"] * self.gated
        return " x ".join([f"S{self.n}", *(f"({scale})^{self.n}" for scale in scales)])

    exchanges = True
    represents = "permutations"

    @property
    def allowed(self) -> torch.Tensor:
        """The scalings that exist, as booleans `[2]`."""
        return torch.tensor([self.degree is not None, self.gated])

    @property
    def dimension(self) -> int:  # type: ignore[override]
        return self.n * int(self.allowed.sum())

    @property
    def stretches(self) -> bool:  # type: ignore[override]
        return self.dimension > 0

    def count(self, role: Role) -> int:
        return self.n

    def exponents(self, role: Role) -> torch.Tensor:
        """Powers of `a` and `b`, `[2]`, by which an axis in this role scales."""
        powers = {"active": (1, 0), "linear": (0, 1), "down": (-(self.degree or 0), -1)}[role]
        return torch.tensor(powers, dtype=torch.float64) * self.allowed

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, 3, self.n)

    def element(self, order: torch.Tensor, active: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """`[copies, 3, F]` from indices and the two scalings, each `[F]` or `[copies, F]`."""
        return torch.stack([order.double(), active.double(), linear.double()], dim=-2).reshape(-1, 3, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        ones = torch.ones(self.n)
        return self.element(torch.arange(self.n), ones, ones).repeat(copies, 1, 1)

    def representing(self, actions: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(self.n)
        return torch.cat([self.element(action.argsort(), ones, ones) for action in actions])

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        first, second = b[:, 0].long(), a[:, 0].long()
        undo = first.argsort(dim=1)[:, None].expand(-1, 2, -1)
        return torch.cat([b[:, :1].gather(2, second[:, None]), a[:, 1:].gather(2, undo) * b[:, 1:]], dim=1)

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        order = element[:, 0].long()
        scales = (1 / element[:, 1:]).gather(2, order[:, None].expand(-1, 2, -1))
        return torch.cat([order.argsort(dim=1)[:, None].double(), scales], dim=1)

    def draw(self, generator: torch.Generator | None, special: bool, compact: bool) -> torch.Tensor:
        """
        Uniform permutations, scalings log-uniform in `[1/SPREAD, SPREAD]`; `special`: no exchange, no sign; `compact`:
        no scaling but signs.
        """
        order = torch.arange(self.n) if special else torch.randperm(self.n, generator=generator)
        draws = 2 * torch.rand(3, self.n, generator=generator, dtype=torch.float64) - 1
        scales = torch.where(self.allowed[:, None] & (not compact), SPREAD ** draws[:2], 1.0)
        if self.gated and not special:
            scales[1] *= draws[2].sign()
        return self.element(order, *scales)[0]

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        """Elements from logarithms of the scalings, `[copies, 2, F]`."""
        return torch.cat([self.identity(len(algebra))[:, :1], algebra.exp()], dim=1)

    def log(self, element: torch.Tensor) -> torch.Tensor:
        self._check_connected(element)
        return element[:, 1:].log()

    def _check_connected(self, element: torch.Tensor) -> None:
        if not torch.equal(element[:, 0], self.identity(len(element))[:, 0]) or (element[:, 1:] <= 0).any():
            raise ValueError(
                "`element` exchanges neurons or turns their sign, which no path joins to the identity. Draw it with "
                "`special=True`."
            )

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """Scale and exchange the rows of `[copies · F, rest]`."""
        element = element.to(tensor.device)
        powers = self.exponents(role).to(tensor.device)
        scale = (element[:, 1:] ** powers[:, None]).prod(dim=1).reshape(-1, 1)
        starts = torch.arange(len(element), device=tensor.device)[:, None] * self.n
        return (scale.to(tensor) * tensor)[(element[:, 0].long() + starts).flatten()]

    def gram(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`a·b` per neuron, `[copies, F]`."""
        return (a * b).sum(-1).reshape(copies, -1)

    def generator(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        return sum(self.exponents(role)[:, None] * value[:, None] for role, value in grams.items())

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        return sum(grams.values()).flatten()

    def balance(self, grams: dict[Role, torch.Tensor], unpaired: float = 1.0) -> torch.Tensor:
        """
        As for every group, from `|.|²` `[copies, F]` by role.

        Where one of a neuron's factors is empty there is no least norm: then what is filled gets the length
        `unpaired`, the column by the scaling of the factor that is empty.
        """
        down = grams["down"]
        ones = torch.ones_like(down)
        scales_active, scales_linear = self.allowed.tolist()
        degree = self.degree or 0
        active = grams["active"] if scales_active else ones
        linear = grams["linear"] if scales_linear else ones
        # Least `a² A + b² B + D / (a^2p b²)` where `a² A = p D'` and `b² B = D'`, D' being the last term.
        last = down * (linear if scales_linear else ones) * (active / max(degree, 1)) ** degree
        last = last ** (1 / (1 + degree + scales_linear))
        balanced = degree * last / or_one(active), last / or_one(linear)
        square = unpaired**2
        shortened = [torch.where(values > 0, values / square, ones) for values in (active, linear)]
        # The column's square, once the filled factors have that length.
        spare = down * shortened[0] ** degree * (shortened[1] if scales_linear else ones)
        spare = or_one(spare) / torch.where(spare > 0, square, 1.0)
        by_active = (active == 0) & scales_active & ~((linear == 0) & scales_linear)
        alone = (
            torch.where(
                by_active, spare ** (1 / max(degree, 1)), torch.where(active > 0, square / or_one(active), 1.0)
            ),
            torch.where(linear > 0, square / or_one(linear), spare),
        )
        alive = (down > 0) & (active > 0) & (linear > 0)
        squares = [
            torch.where(alive, *pair) if allowed else ones
            for *pair, allowed in zip(balanced, alone, (scales_active, scales_linear), strict=True)
        ]
        return self.element(torch.arange(self.n).expand_as(down), *(square.sqrt() for square in squares))

    def decay(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        charge = self.generator(grams)
        metric = sum(
            norms[:, :, None, None] * torch.outer(self.exponents(role), self.exponents(role))
            for role, norms in grams.items()
        )
        return -(torch.linalg.pinv(metric, rtol=EMPTY, hermitian=True) @ charge.mT[..., None])[..., 0].mT

    def project(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix * self.allowed[:, None]

    def compact(self, element: torch.Tensor) -> torch.Tensor:
        return torch.cat([element[:, :1], element[:, 1:].sign()], dim=1)

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """By descending norm; linear factors of gated neurons get a positive odd moment."""
        norms = sum(view.grams.values())
        active = [rows.pow(3).sum(dim=1) for role, rows, _ in view.pairs() if role == "active"]
        cubes = torch.stack(active).sum(dim=0).reshape(norms.shape)
        order = torch.stack([spectra.descending(*pair, view.key, note) for pair in zip(norms, cubes, strict=True)])
        signs = torch.ones_like(norms)
        if self.gated:
            linear = next(rows for role, rows, _ in view.pairs() if role == "linear")
            moments = spectra.odd_moments(linear.T)
            note("signs", float(moments.abs().min()), UNSIGNED, f"the sign of a neuron in {view.key}")
            signs = spectra.signs(moments).reshape(norms.shape)
        return self.element(order, torch.ones_like(norms), signs)

    def nearest(self, view: View) -> torch.Tensor:
        """The permutation of neurons, and of the signs that a gated MLP allows, that gains most."""
        pairs = self.blocks(view.pairs())
        elements = []
        for copy in range(len(pairs[0][1])):
            fixed, signed = self.likeness([(role, b[copy], a[copy]) for role, b, a in pairs])
            order = assignment(fixed + signed.abs())
            signs = signed.gather(1, order[:, None])[:, 0]
            # A sign belongs to the neuron that is taken, which is scaled before it moves.
            signs = torch.where(signs < 0, -1.0, 1.0)[order.argsort()]
            elements.append(self.element(order, torch.ones(self.n), signs if self.gated else torch.ones(self.n)))
        return torch.cat(elements)

    def blocks(self, pairs: Iterable) -> list[tuple[Role, torch.Tensor, torch.Tensor]]:
        """Axes `[copies · F, rest]` with the copies apart, `[copies, F, rest]`."""
        return [(role, *(side.unflatten(0, (-1, self.n)) for side in (b, a))) for role, b, a in pairs]

    def likeness(self, pairs: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Products `[F, F]` of all neurons of two MLPs, of what has a sign of its own, and of what a sign may turn."""
        fixed, signed = (pairs[0][1].new_zeros(self.n, self.n, dtype=torch.float32) for _ in range(2))
        for role, b, a in pairs:
            likeness = fixed if not self.gated or role == "active" else signed
            likeness.addmm_(b.float(), a.float().T)
        return fixed.cpu(), signed.cpu()


def sums_of_cubes(group: Group, view: View) -> dict[Role, torch.Tensor]:
    """By role the sum of the cubes of the weights of each head or neuron; other frames are canonical by now."""
    cubes: dict[Role, list[torch.Tensor]] = {}
    for role, weights, _ in view.pairs():
        cubes.setdefault(role, []).append(weights.reshape(group.count(role), -1).pow(3).sum(dim=1))
    return {role: torch.stack(parts).sum(dim=0) for role, parts in cubes.items()}


def assignment(gains: torch.Tensor) -> torch.Tensor:
    """
    The permutation `[n]` of columns that makes the sum of `gains[i, p[i]]` `[n, n]` largest.

    Where every row has its maximum in another column that is it already, and much quicker to see.
    """
    best = gains.argmax(dim=1)
    if len(best.unique()) == len(best):
        return best
    with needs("align"):
        from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.from_numpy(columns)
