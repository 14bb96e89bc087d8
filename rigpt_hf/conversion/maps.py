"""What a weight map is: rules that name a RiGPT module, the stock modules it is made of, and how it meets the frames.

A family of stock checkpoints (GPT-2, Llama) is described by one [`Family`], which is data. Both directions read the
same rules: `folds.fold` makes RiGPT tensors from stock ones, `export` makes stock tensors from RiGPT ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..checkpoints.read import name_some


__all__ = ["Family", "Role", "Rule", "name_some"]


class Role(Enum):
    """How a module's weight meets the stream, which decides how it is folded and how it turns back."""

    COPY = "copy"  # rows are vectors of the lexical frame: nothing to do
    POSITIONS = "positions"  # rows are vectors of the stream
    READER = "reader"  # columns read the normalised stream
    WRITER = "writer"  # rows write into the stream
    INJECTION = "injection"  # project_in: made of nothing
    EXTRACTION = "extraction"  # project_out: made of the last norm alone


@dataclass(frozen=True)
class Rule:
    """
    One RiGPT module and what it is made of. `{i}` in a name stands for the number of the layer.

    Args:
        target (`str`): module of RiGPT, without `.weight` or `.bias`.
        role (`Role`): how it meets the stream.
        source (`str`, *optional*): the stock module it is made of.
        norm (`str`, *optional*): the stock norm in front of it, whose gain and bias it takes over.
        part (`tuple[int, int]`, defaults to `(0, 1)`):
            `(k, n)`: the k-th of n equal parts of the stock module's outputs.
        is_query (`bool`, defaults to `False`): takes over the family's `query_scale`.
    """

    target: str
    role: Role
    source: str | None = None
    norm: str | None = None
    part: tuple[int, int] = (0, 1)
    is_query: bool = False

    def at(self, layer: int) -> "Rule":
        """The rule for one layer."""
        names = (name and name.replace("{i}", str(layer)) for name in (self.target, self.source, self.norm))
        target, source, norm = names
        assert target is not None
        return Rule(target, self.role, source, norm, self.part, self.is_query)


@dataclass(frozen=True)
class Family:
    """
    A family of stock models, as data.

    Args:
        name (`str`): what error messages call it.
        prefix (`str`): what `...Model` checkpoints leave out of the names that `...ForCausalLM` checkpoints have.
        rules (`tuple[Rule, ...]`): always; tied_rules, untied_rules: as `tie_word_embeddings` says.
        final_norm (`str`): the norm in front of the head.
        head (`str`): the head, whose weight is the table of tokens where embeddings are tied.
        embedding (`str`): the table of tokens.
        centred (`bool`): the norm subtracts the mean (LayerNorm); RMSNorm does not.
        norm_bias (`bool`): the norms have biases.
        transposed (`tuple[str, ...]`): modules whose weight is stored `[in, out]`, with `{i}`.
        harmless (`tuple[str, ...]`): regular expressions of source keys that carry nothing learned.
        query_scale (`Callable`): `(config, layer) -> float`, a constant of the stock scores folded into the queries.
    """

    name: str
    prefix: str
    rules: tuple[Rule, ...]
    tied_rules: tuple[Rule, ...]
    untied_rules: tuple[Rule, ...]
    final_norm: str
    head: str
    embedding: str
    centred: bool
    norm_bias: bool
    transposed: tuple[str, ...]
    harmless: tuple[str, ...]
    query_scale: Callable[[Any, int], float]

    def expand(self, num_layers: int, tied: bool) -> Iterator[tuple[Rule, int]]:
        """All rules of a model, each with the number of its layer (-1 outside of the layers)."""
        for rule in (*self.rules, *(self.tied_rules if tied else self.untied_rules)):
            if "{i}" in rule.target:
                yield from ((rule.at(layer), layer) for layer in range(num_layers))
            else:
                yield rule, -1

    def is_transposed(self, module: str) -> bool:
        """Whether the weight of this stock module is stored `[in, out]`, as GPT-2's Conv1D does."""
        return any(
            module.startswith(start) and module.endswith(end)
            for start, _, end in (name.partition("{i}") for name in self.transposed)
        )
