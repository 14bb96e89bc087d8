"""The frame in which a RiGPT's stream is expressed when it leaves for a stock model.

Shapes: V vocabulary, D lexical, d stream of the RiGPT, S stream of the stock model. `U` project_in `[d, D]`, `G`
project_out `[D, d]`, `b` its bias `[D]`, `E` table of tokens `[V, D]`, `L` table of the head `[V, D]` (`E` if tied),
`C = I - 11ᵀ/S`. The stock stream is `Qᵀ x` with an isometry `Q` `[d, S]`; `S = d` but for a GPT-2 that needs more.

Lexical frame, possible if `UᵀU = c² C` (LayerNorm) or `c² I` (RMSNorm) and everything written lies in the range of
`U`: `Q = U/c`, token table `c E`. If `G Q = diag(g) C`, resp. `diag(g)`, the last norm takes `g` and `b` and the head
stays `L`; where it is tied and so `c L`, the norm takes `g/c` and `b/c`.

Where the lexical frame was turned, embeddings stay tied all the same if `G = Uᵀ M` with `M = Q diag(g) Qᵀ`, which is
any symmetric matrix: the token table is then `E Uᵀ Q`, and the logits are `E G n(x) = (E Uᵀ Q) diag(g) n(Qᵀ x)`. Not
for GPT-2, whose gains and centring do not commute.

Stream frame: `Q` is the identity; token table `E Uᵀ Q`, head `L G Q`. GPT-2's LayerNorm removes the direction `1/√S`,
so there `Q` is the reflection that puts a direction nobody writes into on it; where all d are in use, the stream gets
more, see `width` of [`Family`]. GPT-2's head has no bias, but its last norm has: `n(x)` is orthogonal to `1`, so with
`ln_f.bias = 1` the head `L (G C + b 1ᵀ/S)` gives `L (G n + b)` exactly.

Where norms stand behind blocks, their gains lie in one frame alone: `Q` is `carry`, which is `U/c` as a conversion
made it. The head is tied if `G Q = Uᵀ Q diag(g)`.

Where a class has a norm behind its embeddings, `n(U E)` meets `M = Q C diag(h) C Uᵀ`, as a conversion made it, and `G`
says what `Q` is: `G Gᵀ = diag(g²) - g gᵀ/d` gives `g`, up to a sign for all of it, and `Qᵀ = G/g`.

A head with a bias takes `L b` as that, and lexical dimensions that nothing else is in are left out.

A model that normalises its embeddings has the table `n(E Uᵀ) Q` of a stock class that does not, which unties it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers.utils import logging

from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from .maps import Family


logger = logging.get_logger(__name__)

# How far from exact an identity between stored weights may be: their rounding, with room for its accumulation.
ROUNDING = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FRAMES = ("auto", "lexical", "stream")
# The modules at both ends of the stream, and what leads into it from the gains behind blocks.
ENDS = ("model.embed_tokens", "model.project_in", "model.embedding_map", "model.carry", "model.project_out", "lm_head")


@dataclass(frozen=True)
class StockFrame:
    """Where the stock stream lies, and what stands at its two ends. All float64."""

    basis: torch.Tensor | None  # Q [d, S]; None: the identity
    embedding: torch.Tensor  # [V, S], as the stream begins with it
    gain: torch.Tensor  # [S], of the last norm
    bias: torch.Tensor  # [S], of the last norm
    head: torch.Tensor | None  # [V, S]; None: tied
    head_bias: torch.Tensor  # [V]
    inner: tuple[torch.Tensor, torch.Tensor] | None = None  # gain and bias [S] of a norm behind the embeddings

    def read(self, weight: torch.Tensor) -> torch.Tensor:
        """`W Q` for a weight `[n, d]`."""
        return weight if self.basis is None else weight @ self.basis

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """`Qᵀ W` for a weight `[d, n]` or a bias `[d]`."""
        return weight if self.basis is None else self.basis.T @ weight


def choose_frame(config: RiGPTConfig, state: dict[str, torch.Tensor], family: Family, frame: str) -> StockFrame:
    """
    The frame asked for, or the first exact one. A warning says why embeddings that were tied are not any more.

    Args:
        config (`RiGPTConfig`), state (`dict[str, torch.Tensor]`): the RiGPT.
        family (`Family`): the stock family to express it in.
        frame (`str`): "auto", "lexical" or "stream".

    Raises:
        ValueError: if the frame asked for is not exact, or none is; the message says why.
    """
    if frame not in FRAMES:
        raise ValueError(f"`frame` must be one of {', '.join(FRAMES)}, got {frame!r}.")
    ends = _Ends(config, state, family)
    if config.embedding_norm_map:
        return ends.mapped(frame)
    placed, reason = None, "`frame='stream'` keeps the stream as it is"
    if frame != "stream":
        obstacle = ends.lexical_obstacle()
        placed = ends.lexical() if obstacle is None else None
        if ends.tied and (placed is None or placed.head is not None):
            eigenframe, reason = ends.eigenframe()
            placed = eigenframe or placed
        if placed is None and frame == "lexical":
            raise ValueError(f"`frame='lexical'` is not exact for this model: {obstacle}. Try `frame='stream'`.")
    placed = placed or ends.stream()
    if ends.tied and placed.head is not None:
        logger.warning(
            f"The head gets a table of its own, of {placed.head.numel():,} numbers, where this model uses its "
            f"embeddings twice: {reason}."
        )
    return placed


class _Ends:
    """The maps at both ends of the stream, in float64, and everything that is written into it."""

    def __init__(self, config: RiGPTConfig, state: dict[str, torch.Tensor], family: Family):
        self.config, self.state, self.centred, self.family = config, state, family.centred, family
        self.tolerance = ROUNDING[state["model.embed_tokens.weight"].dtype]
        self.tied = config.tie_word_embeddings
        self.table_of_frames = table_of(config)
        self.table = self._get("model.embed_tokens.weight")
        self.head = self.table if self.tied else self._get("lm_head.weight")
        self.carry = self._get("model.carry.weight") if config.post_norm else None
        bias = self._get("model.project_out.bias") if config.output_bias else None
        self.bias = None if bias is None or not bool(bias.any()) else bias
        self.head_bias = self.head.new_zeros(len(self.head))
        if self.bias is not None and family.head_bias:
            self.head_bias, self.bias = self.head @ self.bias, None
        self.has_projections = config.embedding_size is not None
        if self.has_projections:
            self.into, self.out = self._get("model.project_in.weight"), self._get("model.project_out.weight")
            used = self.into.any(0) | self.out.any(1) | (False if self.bias is None else self.bias != 0)
            if not used.all():
                self.into, self.out, self.table = self.into[:, used], self.out[used], self.table[:, used]
                self.head, self.bias = self.head[:, used], None if self.bias is None else self.bias[used]
        self.baked = config.embedding_norm and not family.embedding_norm

    def _get(self, name: str) -> torch.Tensor:
        return self.state[name].to(torch.float64)

    def _is_small(self, error: torch.Tensor, reference: torch.Tensor) -> bool:
        return float(error.norm()) <= self.tolerance * float(reference.norm())

    def _centre(self, matrix: torch.Tensor) -> torch.Tensor:
        """`M C` for LayerNorm, `M` for RMSNorm."""
        return matrix - matrix.mean(dim=-1, keepdim=True) if self.centred else matrix

    def _width(self, least: int) -> int:
        """The size of a stock stream that holds so many dimensions."""
        return least if self.family.width is None else self.family.width(self.config, least)

    def _framed(self, basis: torch.Tensor | None, table: torch.Tensor, size: int) -> StockFrame:
        """A frame with these embeddings `[V, S]`, before the last norm and the head are known; tied."""
        if self.baked:
            table = torch.nn.functional.rms_norm(table, table.shape[-1:], eps=self.config.rms_norm_eps)
        ones = torch.ones(size, dtype=torch.float64, device=table.device)
        return StockFrame(basis, table, ones, ones * 0, None, self.head_bias)

    def written(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that is added to the stream, as columns `[d, n]`, with its name; tables of rows come last."""
        roles = {name: self.table_of_frames.role_on(name, "stream") for name in self.state}
        # Biases of which the sum alone is seen.
        shared = {shift.like: shift.moves for shift in self.table_of_frames.shifts.values() if shift.constant}
        written = {name: self._get(name) for name, role in roles.items() if role == "writes"}
        for one, moved in shared.items():
            if one in written:
                written[one] = sum((written.pop(name) for name in moved if name != one), written[one])
        for name, columns in written.items():
            yield name, columns.reshape(self.config.hidden_size, -1)
        for name in reversed([name for name, role in roles.items() if role == "rows"]):
            yield name, self._get(name).T

    def _length(self) -> float:
        """How much longer `project_in` makes embeddings: `c`, which is 1 exactly where it is so up to rounding."""
        rank = self.into.shape[1] - self.centred
        length = float(self.into.norm()) / rank**0.5
        return 1.0 if abs(length - 1) <= self.tolerance else length

    def lexical_obstacle(self) -> str | None:
        """Why the lexical frame is not exact, or `None` if it is."""
        size = self.config.hidden_size
        if not self.has_projections:
            return "it has no `project_in`: its embeddings are vectors of the stream already"
        if size != self.table.shape[1]:
            return f"`embedding_size={self.config.embedding_size}` differs from `hidden_size={size}`"
        if (width := self._width(size)) != size:
            return f"its heads need a stream of {width} in {self.family.name}, and `hidden_size={size}`"
        into = self.into / self._length()
        expected = self._centre(torch.eye(size, dtype=torch.float64, device=into.device))
        if not self._is_small(into.T @ into - expected, expected):
            return "`project_in` is no longer a rotation of the one a conversion makes"
        if self.carry is not None and not self._is_small(into - self.carry, into):
            return "gains stand behind its blocks, in another frame than that of its embeddings"
        for name, columns in self.written():
            if not self._is_small(columns - into @ (into.T @ columns), columns):
                return f"`{name}` writes outside of the range of `project_in`"
        return None

    def lexical(self) -> StockFrame:
        """The stream in the frame of the embeddings."""
        length, size = self._length(), self.config.hidden_size
        into = self.into if length == 1 else self.into / length
        frame = self._framed(into, self.table if length == 1 else self.table * length, size)
        seen = self._centre(self.out @ into)  # [D, D], what reads the normalised stream in this frame
        gain = seen.diagonal() / (1 - 1 / size if self.centred else 1)
        is_gain = self._is_small(seen - self._centre(torch.diag(gain)), seen)
        keeps = self.tied and not self.baked
        gain = gain / length if keeps else gain
        if is_gain and self._has(gain) and (self.bias is None or self.family.norm_bias):
            bias = frame.bias if self.bias is None else self.bias / length if keeps else self.bias
            return replace(frame, gain=gain, bias=bias, head=None if keeps else self.head)
        return self._with_head(frame, seen)

    def mapped(self, frame: str) -> StockFrame:
        """The frame of the embeddings, where the map behind their norm is a gain in it; there is no other to take."""
        size = self.config.hidden_size
        if frame != "stream" and self.has_projections and self.table.shape[1] == size:
            gram = self.out @ self.out.T
            squares, products = gram.diagonal(), gram - gram.diagonal().diag()
            # Those of neighbours in `G` against the strongest, and then against all of them, which rounds away less.
            signs = torch.where(products[squares.argmax()] > 0, -1.0, 1.0).to(torch.float64)
            gain = (squares / (1 - 1 / size)).sqrt() * torch.where(products @ signs > 0, -1.0, 1.0)
            basis = (self.out / gain[:, None]).T  # Q
            inner = basis.T @ self._get("model.embedding_map.weight") @ self.into  # C diag(h) C
            mean = inner.trace() / (size - 1)
            own = (inner.diagonal() - mean / size) / (1 - 2 / size)
            centre = self._centre(torch.eye(size, dtype=torch.float64, device=gain.device))
            exact = all(
                self._is_small(found - expected, expected)
                for found, expected in (
                    (self.into.T @ self.into, centre),
                    (basis.T @ basis, centre),
                    (inner, centre @ torch.diag(own) @ centre),
                    *((columns, basis @ (basis.T @ columns)) for _, columns in self.written()),
                )
            )
            if exact:
                bias = gain * 0 if self.bias is None else self.bias
                head, shift = None if self.tied else self.head, self._get("model.embedding_map.bias")
                return StockFrame(basis, self.table, gain, bias, head, self.head_bias, (own, basis.T @ shift))
        raise ValueError(
            f"`embedding_norm_map=True` has no counterpart in {self.family.name} unless the map is the gain of a norm "
            "in the frame of the embeddings, as a conversion makes it, and `frame` is not 'stream'. Export the model "
            "before its lexical frame is turned or its ends are trained, or keep it as RiGPT."
        )

    def _has(self, gain: torch.Tensor) -> bool:
        """Whether the last norm of the family has these gains, or none and they are 1."""
        return self.family.final_gain or self._is_small(gain - 1, gain)

    def eigenframe(self) -> tuple[StockFrame | None, str]:
        """A frame that keeps tied embeddings tied whatever was done to the lexical frame; why there is none if so."""
        if self.baked:
            return None, "`embedding_norm` is in the embeddings, and not in the head"
        if self.carry is not None:
            return None, "`project_out` is no gain in the frame of the gains that stand behind its blocks"
        if self.centred:
            return None, (
                f"`project_out` is no gain in the frame of the embeddings, and {self.family.name}, which centres its "
                "stream, can tie them in no other"
            )
        if not self.family.final_gain:
            return None, f"`project_out` is not `project_in` read backwards, and {self.family.name} has no gains"
        if self.bias is not None:
            return None, "`project_out.bias` is not 0"
        if not self.has_projections:
            return None, "they are vectors of the stream"
        into, out = self.into, self.out
        inverse = torch.linalg.pinv(into)  # [D, d]
        half = inverse.T @ out
        # The symmetric solution of `Uᵀ M = G`, if there is one: where D < d it is one of many.
        metric = half + half.T - inverse.T @ (out @ into) @ inverse
        values, basis = torch.linalg.eigh((metric + metric.T) / 2)
        error = into.T @ (basis * values) @ basis.T - out
        if not self._is_small(error, out):
            return None, (
                "`project_out` is a gain of the last norm in no frame of the stream, as `project_in⁻ᵀ project_out` is "
                "not symmetric"
            )
        frame = self._framed(basis, self.table @ (into.T @ basis), self.config.hidden_size)
        return replace(frame, gain=values), ""

    def stream(self) -> StockFrame:
        """The stream as it is, up to a reflection and dimensions that nobody writes into, or in that of its gains."""
        basis = self.carry if self.carry is not None else self._reflection() if self.centred else None
        size = self.config.hidden_size if basis is None else basis.shape[1]
        into = seen = torch.eye(self.config.hidden_size, dtype=torch.float64, device=self.table.device)
        table = self.table
        if self.has_projections:
            into, seen, table = self.into.T, self.out, table @ self.into.T
        if basis is not None:
            into, seen, table = into @ basis, seen @ basis, table @ basis
        placed, into, seen = self._framed(basis, table, size), self._centre(into), self._centre(seen)
        gain = (into * seen).sum(0) / into.square().sum(0).clamp_min(1e-300)
        is_gain = self._is_small(seen - self._centre(into * gain), seen) and self._has(gain)
        if self.tied and not self.baked and self.bias is None and is_gain:
            return replace(placed, gain=gain)
        return self._with_head(placed, seen)

    def _with_head(self, frame: StockFrame, seen: torch.Tensor) -> StockFrame:
        """`frame` with a head of its own, `L` times what reads the stream, and the bias by way of the last norm's."""
        if self.bias is None:
            return replace(frame, head=self.head @ seen)
        if not self.family.norm_bias:
            raise ValueError(
                f"`output_bias=True` has no counterpart in {self.family.name}, whose last norm and head have no bias, "
                "unless `project_out.bias` is 0. Export to 'gpt2' if the model has learned positions, or keep it as "
                "RiGPT."
            )
        seen = seen + torch.outer(self.bias, frame.gain) / len(frame.gain)
        return replace(frame, bias=frame.gain, head=self.head @ seen)

    def _reflection(self) -> torch.Tensor | None:
        """
        The isometry `Q` of a Householder reflection that takes a direction nothing is written into to `1/√S`: one of
        the d where there is one, else one of those that are added; `None` if it is there already.
        """
        size, device = self.config.hidden_size, self.table.device
        unused = torch.full((size,), size**-0.5, dtype=torch.float64, device=device)
        placed = free = self._strength(unused) <= self.tolerance
        if not placed:
            gram = torch.zeros(size, size, dtype=torch.float64, device=device)
            for _, columns in self.written():
                gram += columns @ columns.T / columns.square().sum().clamp_min(1e-300)
            unused = torch.linalg.eigh(gram).eigenvectors[:, 0]
            free = self._strength(unused) <= self.tolerance
        if not free and self.family.width is None:
            raise ValueError(
                f"LayerNorm removes one direction of the stream in {self.family.name}, and this model's stream uses "
                f"all {size}: the weakest is still written with relative strength {self._strength(unused):.1e}. Only "
                "a model with an unused direction (as any converted from such a class has until it is trained "
                "further) can be exported to it."
            )
        width = self._width(size if free else size + 1)
        if width != size:
            unused = torch.nn.functional.one_hot(torch.tensor(width - 1, device=device), width).to(torch.float64)
        elif placed:
            return None
        normal = unused - width**-0.5
        normal = normal / normal.norm()
        return (torch.eye(width, dtype=torch.float64, device=device) - 2 * torch.outer(normal, normal))[:size]

    def _strength(self, direction: torch.Tensor) -> float:
        """The relative size of a writer's output along a direction: the largest over the writers."""
        return max(
            float((columns.T @ direction).norm() / columns.norm().clamp_min(1e-300)) for _, columns in self.written()
        )
