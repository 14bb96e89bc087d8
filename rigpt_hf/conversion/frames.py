"""The frame in which a RiGPT's stream is expressed when it leaves for a stock model.

Shapes: V vocabulary, D lexical, d stream. `U` project_in `[d, D]`, `G` project_out `[D, d]`, `b` its bias `[D]`, `E`
table of tokens `[V, D]`, `L` table of the head `[V, D]` (`E` where tied), `C = I - 11ᵀ/d`.

Lexical frame, possible if `UᵀU = C` (LayerNorm) or `I` (RMSNorm) and everything written lies in the range of `U`:
`Q = U`, token table `E`. If `G U = diag(g) C`, resp. `diag(g)`, the last norm takes `g` and `b`; the head stays `L`.

Stream frame: `Q` is the identity, for LayerNorm the reflection that puts the direction nobody writes into on `1/√d`;
token table `E Uᵀ Q`, head `L G Q`. The stock head has no bias, but its last norm has: `n(x)` is orthogonal to `1`, so
with `ln_f.bias = 1` the head `L (G C + b 1ᵀ/d)` gives `L (G n + b)` exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from .maps import Family


# How far from exact an identity between stored weights may be: their rounding, with room for its accumulation.
ROUNDING = {torch.float64: 1e-11, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FRAMES = ("auto", "lexical", "stream")


@dataclass(frozen=True)
class StockFrame:
    """Where the stock stream lies, and what stands at its two ends. All float64."""

    basis: torch.Tensor | None  # Q [d, S]; None: the identity
    embedding: torch.Tensor  # [V, S]
    gain: torch.Tensor  # [S], of the last norm
    bias: torch.Tensor  # [S], of the last norm
    head: torch.Tensor | None  # [V, S]; None: tied

    def read(self, weight: torch.Tensor) -> torch.Tensor:
        """`W Q` for a weight `[n, d]`."""
        return weight if self.basis is None else weight @ self.basis

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """`Qᵀ W` for a weight `[d, n]` or a bias `[d]`."""
        return weight if self.basis is None else self.basis.T @ weight


def choose_frame(config: RiGPTConfig, state: dict[str, torch.Tensor], family: Family, frame: str) -> StockFrame:
    """
    The frame asked for, or the first exact one.

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
    if frame != "stream":
        obstacle = ends.lexical_obstacle()
        if obstacle is None:
            return ends.lexical()
        if frame == "lexical":
            raise ValueError(f"`frame='lexical'` is not exact for this model: {obstacle}. Try `frame='stream'`.")
    return ends.stream()


class _Ends:
    """The maps at both ends of the stream, in float64, and everything that is written into it."""

    def __init__(self, config: RiGPTConfig, state: dict[str, torch.Tensor], family: Family):
        self.config, self.state, self.centred, self.family = config, state, family.centred, family
        self.tolerance = ROUNDING[state["model.embed_tokens.weight"].dtype]
        self.tied = config.tie_word_embeddings
        self.table_of_frames = table_of(config)
        self.table = self._get("model.embed_tokens.weight")
        self.head = self.table if self.tied else self._get("lm_head.weight")
        self.has_projections = config.embedding_size is not None
        self.bias = self._get("model.project_out.bias") if config.output_bias else None
        self.ones = torch.ones(config.hidden_size, dtype=torch.float64, device=self.table.device)

    def _get(self, name: str) -> torch.Tensor:
        return self.state[name].to(torch.float64)

    def _is_small(self, error: torch.Tensor, reference: torch.Tensor) -> bool:
        return float(error.norm()) <= self.tolerance * float(reference.norm())

    def _centre(self, matrix: torch.Tensor) -> torch.Tensor:
        """`M C` for LayerNorm, `M` for RMSNorm."""
        return matrix - matrix.mean(dim=-1, keepdim=True) if self.centred else matrix

    def written(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that is added to the stream, as columns `[d, n]`, with its name; tables of rows come last."""
        roles = {name: self.table_of_frames.role_on(name, "stream") for name in self.state}
        for name in (name for name, role in roles.items() if role == "writes"):
            yield name, self._get(name).reshape(self.config.hidden_size, -1)
        for name in reversed([name for name, role in roles.items() if role == "rows"]):
            yield name, self._get(name).T

    def lexical_obstacle(self) -> str | None:
        """Why the lexical frame is not exact, or `None` if it is."""
        size, lexical = self.config.hidden_size, self.config.embedding_size
        if not self.has_projections:
            return "it has no `project_in`: its embeddings are vectors of the stream already"
        if size != lexical:
            return f"`embedding_size={lexical}` differs from `hidden_size={size}`"
        into = self._get("model.project_in.weight")
        expected = self._centre(torch.eye(size, dtype=torch.float64, device=into.device))
        if not self._is_small(into.T @ into - expected, expected):
            return "`project_in` is no longer a rotation of the one a conversion makes"
        for name, columns in self.written():
            if not self._is_small(columns - into @ (into.T @ columns), columns):
                return f"`{name}` writes outside of the range of `project_in`"
        return None

    def lexical(self) -> StockFrame:
        """The stream in the frame of the embeddings."""
        into, out = self._get("model.project_in.weight"), self._get("model.project_out.weight")
        size = self.config.hidden_size
        seen = self._centre(out @ into)  # [D, D], what reads the normalised stream in this frame
        gain = seen.diagonal() / (1 - 1 / size if self.centred else 1)
        is_gain = self._is_small(seen - self._centre(torch.diag(gain)), seen)
        if is_gain and (self.bias is None or self.family.norm_bias):
            bias = torch.zeros_like(gain) if self.bias is None else self.bias
            return StockFrame(into, self.table, gain, bias, None if self.tied else self.head)
        return self._with_head(StockFrame(into, self.table, self.ones, self.ones * 0, None), seen)

    def stream(self) -> StockFrame:
        """The stream as it is, up to a reflection."""
        basis = self._reflection() if self.centred else None
        placed = StockFrame(basis, self.table, self.ones, self.ones * 0, None)
        table, seen = self.table, torch.eye(self.config.hidden_size, dtype=torch.float64, device=self.table.device)
        if self.has_projections:
            table = table @ self._get("model.project_in.weight").T
            seen = self._get("model.project_out.weight")
        embedding = placed.read(table)
        seen = self._centre(placed.read(seen))
        placed = replace(placed, embedding=embedding)
        if self.tied and self.bias is None and self._is_small(self.head @ seen - embedding, embedding):
            return placed
        return self._with_head(placed, seen)

    def _with_head(self, frame: StockFrame, seen: torch.Tensor) -> StockFrame:
        """`frame` with a head of its own, `L` times what reads the stream, and the bias by way of the last norm's."""
        if self.bias is None or not bool(self.bias.any()):
            return replace(frame, head=self.head @ seen)
        if not self.family.norm_bias:
            raise ValueError(
                "`output_bias=True` has no counterpart in the Llama family, whose last norm and head have no bias, "
                "unless `project_out.bias` is 0. Export to 'gpt2' if the model has learned positions, or keep it as "
                "RiGPT."
            )
        seen = seen + torch.outer(self.bias, self.ones) / self.config.hidden_size
        return replace(frame, bias=self.ones, head=self.head @ seen)

    def _reflection(self) -> torch.Tensor | None:
        """
        The Householder reflection that takes the direction nothing is written into to `1/√d`; `None` if it is there.

        Raises:
            ValueError: if the stream uses all of its dimensions.
        """
        size = self.config.hidden_size
        target = self.ones / size**0.5
        gram = torch.zeros_like(torch.outer(target, target))
        for _, columns in self.written():
            gram += columns @ columns.T / columns.square().sum().clamp_min(1e-300)
        if self._strength(target) <= self.tolerance:
            return None
        null = torch.linalg.eigh(gram).eigenvectors[:, 0]
        strength = self._strength(null)
        if strength > self.tolerance:
            raise ValueError(
                f"LayerNorm removes one direction of the stream in {self.family.name}, and this model's stream uses "
                f"all {size}: the weakest is still written with relative strength {strength:.1e}. Only a model with "
                "an unused direction (as any converted from such a class has until it is trained further) can be "
                "exported to it."
            )
        normal = null - target
        normal = normal / normal.norm()
        return torch.eye(size, dtype=torch.float64, device=null.device) - 2 * torch.outer(normal, normal)

    def _strength(self, direction: torch.Tensor) -> float:
        """The relative size of a writer's output along a direction: the largest over the writers."""
        return max(
            float((columns.T @ direction).norm() / columns.norm().clamp_min(1e-300)) for _, columns in self.written()
        )
