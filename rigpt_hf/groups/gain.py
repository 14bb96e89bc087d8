"""
What gains on single dimensions of a head leave of its group, and the group that the gains bring along.

A gain per dimension commutes with a rotation of a plane only if that is a half turn: [`HalfTurns`]. In return the
gains of queries and of keys may be scaled against each other, and the sign of a gain may go over to the rows in front
of the norm: [`GainScalings`]. Gains are those of all heads, or every head has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import least_norm, spectra
from .base import DEGENERATE, SPREAD, UNSIGNED, Group, Note, Role, View
from .matrix import Stretch
from .planes import Planes


@dataclass(frozen=True)
class HalfTurns(Planes, Group):
    """
    A sign for every plane and for every dimension outside of them. Elements are `[copies, n]`.

    Vectors and covectors turn alike; weights of lengths and frequencies not at all.

    Args:
        n: Dimensions of a head.
        planes: Pairs of dimensions that rotary positions turn.
    """

    n: int
    planes: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{{1,-1}}^{len(self.planes) + len(self.rest)}"

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        return torch.ones(copies, self.n, dtype=torch.float64)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        return element

    def draw(self, generator: torch.Generator | None, special: bool, compact: bool) -> torch.Tensor:
        """Uniform; `special`: the identity, as nothing else is joined to it by a path."""
        if special:
            return self.identity()[0]
        draws = torch.rand(len(self.planes) + len(self.rest), generator=generator, dtype=torch.float64)
        return self.spread(spectra.signs(draws - 0.5))

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        return self.identity(len(algebra))

    def log(self, element: torch.Tensor) -> torch.Tensor:
        self.path(element, 0.0)
        return torch.zeros(len(element), 0, dtype=torch.float64)

    def path(self, element: torch.Tensor, t: float) -> torch.Tensor:
        if (element < 0).any():
            raise ValueError(
                "`element` turns signs, which no path joins to the identity. Draw it with `special=True`."
            )
        return element

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """The signs of `[copies · repeats · n, rest]`; the repeats of one copy share them."""
        if role not in ("vector", "covector"):
            return tensor
        signs = element[:, None, :, None].to(tensor)
        return (signs * tensor.reshape(len(element), -1, self.n, tensor.shape[-1])).reshape(tensor.shape)

    def gram(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`Σ a b` over everything but the frame, `[copies, n]`; of what does not turn number by number."""
        if role not in ("vector", "covector"):
            return (a * b).reshape(copies, -1)
        return (a * b).reshape(copies, -1, self.n, a.shape[-1]).sum((1, 3))

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        return ((grams["vector"] + grams["covector"]) / 2).flatten()

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """Signs by odd moments, of a plane by that of its first dimension."""
        copies = len(view.total())
        moments = spectra.odd_moments(view.anchors()).reshape(copies, self.n)
        decided = self.gather(moments, [0])
        note("signs", float(decided.abs().min()), UNSIGNED, f"a sign of {view.key}")
        return self.spread(spectra.signs(decided))

    def nearest(self, view: View) -> torch.Tensor:
        return self.spread(spectra.signs(self.gather(view.total())))

    def largest_trace(self, cross: torch.Tensor) -> torch.Tensor:
        return self.gather(cross.diagonal(dim1=-2, dim2=-1)).abs().sum(-1)


@dataclass(frozen=True)
class GainScalings(Planes, Group):
    """
    Gains of queries times `u` and gains of keys times `w`, with `|u| |w| = 1`, and rows times the signs of these.

    `g n(x)` is the same for `-g` and `-x`; and a score that is a product stays if one of its factors is scaled by `a`
    and the other by `1/a`, one `a` for both dimensions of a plane, as the rotation mixes them. Elements are
    `[copies, repeats + 1, n]`: the `u` of each set of gains of queries, which have one size, and `w`. Roles:
    `query_gain`, `key_gain`; `query_rows`, `key_rows`, to which signs alone go; `query_bias`, `key_bias` for what is
    added behind the gains, to which sizes alone go; and `metric` for weights of `|key|²`, which follow a common `a`.

    Args:
        n: Dimensions of a head.
        stretch: Which scalings leave the score alone, as for [`MatrixGroup`].
        planes: Pairs of dimensions that rotary positions turn.
        repeats: Sets of gains of queries for one of keys: 1, or the query heads of a key-value head.
    """

    n: int
    stretch: Stretch = "free"
    planes: tuple[tuple[int, int], ...] = ()
    repeats: int = 1

    QUERIES, KEYS = slice(None, -1), slice(-1, None)
    ROLES = {"query_gain": QUERIES, "key_gain": KEYS, "query_rows": QUERIES, "key_rows": KEYS}
    ROLES |= {"query_bias": QUERIES, "key_bias": KEYS}

    def __str__(self) -> str:
        scalings = f"(R+)^{self.dimension} x " if self.stretches else ""
        return f"{scalings}{{1,-1}}^{(self.repeats + 1) * self.n}"

    @property
    def dimension(self) -> int:  # type: ignore[override]
        return {"none": 0, "common": 1, "free": len(self.planes) + len(self.rest)}[self.stretch]

    @property
    def stretches(self) -> bool:  # type: ignore[override]
        return self.stretch != "none"

    def shape(self, copies: int) -> tuple[int, ...]:
        return (copies, self.repeats + 1, self.n)

    def identity(self, copies: int = 1) -> torch.Tensor:
        return torch.ones(self.shape(copies), dtype=torch.float64)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def inverse(self, element: torch.Tensor) -> torch.Tensor:
        return 1 / element

    def draw(self, generator: torch.Generator | None, special: bool, compact: bool) -> torch.Tensor:
        """
        Scalings log-uniform in `[1/SPREAD, SPREAD]`, signs uniform; `special`: no sign; `compact`: no scaling.
        """
        draws = 2 * torch.rand((self.repeats + 1) * self.n, generator=generator, dtype=torch.float64) - 1
        sizes = 2 * torch.rand(1, self.dimension, generator=generator, dtype=torch.float64) - 1
        element = self.identity() if compact else SPREAD ** self.exponents(sizes)
        return (element if special else element * spectra.signs(draws).reshape(-1, self.n))[0]

    def exponents(self, algebra: torch.Tensor) -> torch.Tensor:
        """Logarithms of `u` and `w`, `[copies, repeats + 1, n]`, from those of the scalings, `[copies, dimension]`."""
        match self.stretch:
            case "free":
                whole = self.spread(algebra)
            case "common":
                whole = algebra.expand(-1, self.n)
            case "none":
                whole = torch.zeros(len(algebra), self.n, dtype=torch.float64)
        return torch.stack([whole] * self.repeats + [-whole], dim=1)

    def exp(self, algebra: torch.Tensor) -> torch.Tensor:
        return self.exponents(algebra).exp()

    def log(self, element: torch.Tensor) -> torch.Tensor:
        if (element < 0).any():
            raise ValueError(
                "`element` turns signs of gains, which no path joins to the identity. Draw it with `special=True`."
            )
        return self.gather(element[:, 0].log(), [0])[:, : self.dimension]

    def act(self, element: torch.Tensor, role: Role, tensor: torch.Tensor) -> torch.Tensor:
        """Scale `[copies · repeats · n, rest]`; what shares a set of gains shares their scalings."""
        if role == "metric":
            common = self.stretch == "common"
            scales = element[:, :1, :1].square() if common else torch.ones(len(element), 1, 1).double()
        else:
            scales = element[:, self.ROLES[role]]
            scales = scales.sign() if role.endswith("rows") else scales.abs() if role.endswith("bias") else scales
        blocks = tensor.reshape(len(element), -1, scales.shape[2], tensor.shape[-1])
        return (scales[..., None].to(tensor) * blocks).reshape(tensor.shape)

    def gram(self, role: Role, a: torch.Tensor, b: torch.Tensor, copies: int) -> torch.Tensor:
        """`Σ a b` over everything but the frame, `[copies, n]`, of weights of lengths `[copies, 1]`."""
        size = 1 if role == "metric" else self.n
        return (a * b).reshape(copies, -1, size, a.shape[-1]).sum((1, 3))

    def _both(self, grams: dict[Role, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights with which queries, keys and the lengths count, each `[copies, dimension]`."""
        empty = torch.zeros(len(grams["query_gain"]), 1, dtype=grams["query_gain"].dtype)
        metric = grams.get("metric", empty) if self.stretch == "common" else empty
        queries, keys = (grams[f"{of}_gain"] + grams.get(f"{of}_bias", 0) for of in ("query", "key"))
        if self.stretch == "common":
            return queries.sum(1, keepdim=True), keys.sum(1, keepdim=True), metric
        return self.gather(queries), self.gather(keys), metric

    def generator(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        queries, keys, metric = self._both(grams)
        return queries - keys + 2 * metric

    def project(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    def balance(self, grams: dict[Role, torch.Tensor], unpaired: float = 1.0) -> torch.Tensor:
        queries, keys, metric = self._both(grams)
        if self.stretch == "common":
            squares = [
                least_norm.common_stretch(*three, unpaired)
                for three in zip(queries[:, 0], keys[:, 0], metric[:, 0], strict=True)
            ]
            return self.exp(torch.stack(squares)[:, None].sqrt().log())
        return self.exp(least_norm.plane_stretches(queries, keys, unpaired).log())

    def decay(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        queries, keys, metric = self._both(grams)
        size = queries + keys + 4 * metric
        return torch.where(size > 0, -self.generator(grams) / least_norm.or_one(size), 0.0)

    def compact(self, element: torch.Tensor) -> torch.Tensor:
        return element.sign()

    def spectrum(self, grams: dict[Role, torch.Tensor]) -> torch.Tensor:
        return (grams["query_gain"] * grams["key_gain"]).sqrt().flatten()

    def orient(self, view: View, note: Note) -> torch.Tensor:
        """All gains positive."""
        gains = {role: a for role, a, _ in view.pairs() if role.endswith("gain")}
        keys = gains["key_gain"].reshape(-1, 1, self.n)
        sizes = torch.cat([gains["query_gain"].reshape(len(keys), -1, self.n), keys], dim=1)
        smallest = float(sizes.abs().min() / sizes.abs().max().clamp_min(1e-300))
        note("signs", smallest, DEGENERATE, f"the sign of a gain of {view.key}")
        return spectra.signs(sizes)

    def nearest(self, view: View) -> torch.Tensor:
        """Signs that make gains of one sign, which the rows decide where a gain is zero."""
        copies = len(view.grams["query_gain"])
        pairings = {kind: torch.zeros(self.shape(copies), dtype=torch.float64) for kind in ("gain", "rows")}
        for role, a, b in view.pairs():
            if role in self.ROLES and not role.endswith("bias"):
                sets = pairings[role.rpartition("_")[2]][:, self.ROLES[role]]
                sets += (a * b).reshape(copies, sets.shape[1], -1, self.n, a.shape[-1]).sum((2, 4)).cpu()
        return spectra.signs(torch.where(pairings["gain"] == 0, pairings["rows"], pairings["gain"]))

    def reordered(self, element: torch.Tensor, order: Callable[[Role], torch.Tensor], role: Role) -> torch.Tensor:
        keys = order(role)
        queries = element[:, self.QUERIES].flatten(0, 1)[order("query")].unflatten(0, (-1, self.repeats))
        return torch.cat([queries, element[:, self.KEYS][keys]], dim=1)
