"""A family of stock checkpoints is data: which RiGPT module is made of which stock modules.

A family (GPT-2, Llama) is one file of data and an entry in `families.py`. Both directions read the same rules: `plan`
makes RiGPT tensors from stock ones, `export` makes stock tensors from RiGPT ones. How a tensor meets the residual
stream, and so how it is folded and how it turns back, stands in the table of frames and not here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .experts import Layout


# What `None` says where a stock configuration may have it and RiGPT's may not.
OFF = {"use_cache": False, "attention_dropout": 0.0, "qk_norm": False}
OFF |= dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), False)
# Norms with biases: readers take over what they add, and one option is for all maps of the MLP.
NORM_BIASES: dict[str, Any] = dict.fromkeys(("attention_bias", "mlp_bias", "output_bias"), True)


@dataclass(frozen=True)
class Rule:
    """
    One RiGPT module and what it is made of. `{i}` in a name stands for the number of the layer.

    Args:
        target (`str`): module of RiGPT, without `.weight` or `.bias`; a rule for one that a model lacks is left out. A
            parameter without a module of its own, here or in the source, is taken for the weight of one.
        source (`str`, *optional*): the stock module it is made of; projections are made of nothing or of a norm alone.
        norm (`str`, *optional*): the stock norm in front of it, whose gain and bias it takes over.
        rows (`Callable`, *optional*): `config -> Rows`: the part of the stock module's outputs; all if not given.
        scale (`Callable`, *optional*): `(config, layer) -> float`: a constant of the stock model that it takes over; a
            table of tokens in a frame of its own takes none, which the projections beside it do.
        transposed (`bool`, defaults to `False`): the stock weight is stored `[in, out]`, as GPT-2's Conv1D does.
        bias (`Callable`, *optional*): `config -> bool`: whether the stock module has a bias; it must have one where
            RiGPT has if not given.
        buffer (`str`, *optional*): a buffer of the stock model that holds `scale` as its dtype rounds it.
        behind (`str`, *optional*): RiGPT's norm of heads behind it, whose gains its rows take over if it has metrics.
        gain (`bool`, defaults to `False`): the weights are the gains of such a norm; `{head}` in `source` stands for
            the number of the head where each has a module of its own.
        mean (`bool`, defaults to `False`): such a norm subtracts the mean of each head, as the rows in front of it
            then do.
        values (`Callable`, *optional*): `config -> list[float]`: numbers that the stock class computes and does not
            store, in the order of the weight's entries.
    """

    target: str
    source: str | None = None
    norm: str | None = None
    rows: Callable[[Any], Rows] | None = None
    scale: Callable[[Any, int], float] | None = None
    transposed: bool = False
    bias: Callable[[Any], bool] | None = None
    buffer: str | None = None
    behind: str | None = None
    gain: bool = False
    mean: bool = False
    values: Callable[[Any], list[float]] | None = None

    def at(self, layer: int) -> "Rule":
        """The rule for one layer."""
        names = {name: getattr(self, name) for name in ("target", "source", "norm", "behind")}
        return replace(self, **{name: value and value.replace("{i}", str(layer)) for name, value in names.items()})

    def constant(self, config: Any, layer: int, dtype: torch.dtype) -> float:
        """`scale`, as a model of this dtype has it."""
        scale = 1.0 if self.scale is None else self.scale(config, layer)
        return scale if self.buffer is None else float(torch.tensor(scale, dtype=dtype))


@dataclass(frozen=True)
class Family:
    """
    A family of stock models, as data.

    Args:
        name (`str`): what error messages call it.
        prefix (`str`): what `...Model` checkpoints leave out of the names that `...ForCausalLM` checkpoints have.
        rules (`tuple[Rule, ...]`): every RiGPT module that the family can fill.
        fields (`Mapping[str, str]`): fields of `RiGPTConfig` and what the family calls them, read both ways.
        final_norm (`str`): the norm in front of the head.
        head (`str`): the head, whose weight is the table of tokens where embeddings are tied.
        embedding (`str`): the table of tokens.
        centred (`bool`): the norm subtracts the mean (LayerNorm); RMSNorm does not.
        norm_bias (`bool`): the norms have biases.
        harmless (`tuple[str, ...]`): regular expressions of source keys that carry nothing learned.
        gain_offset (`float`, defaults to 0.0): what a norm adds to the weights that it stores to have its gains.
        head_bias (`bool`, defaults to `False`): the head has a bias. It becomes one more column of the table that the
            head reads, `embedding_size` has one more dimension, and there the last hidden state is 1: the stream
            neither writes it nor is written to from it.
        former (`Mapping[str, str]`, *optional*): beginnings of names that checkpoints have, and the class's for them.
        options (`Mapping[str, str]`, *optional*): as `fields`, read from a source alone. A field that is in neither
            is one that the class does not read, and has its default in RiGPT whatever a configuration says of it.
        embedding_norm (`bool`, defaults to `False`): the class normalises the embeddings of tokens.
        experts (`Layout`, *optional*): how the class stores experts.
        width (`Callable`, *optional*): `(config, least) -> int`: the size of a stream that holds `least` dimensions
            and the heads of a RiGPT; `least` if not given.
    """

    name: str
    prefix: str
    rules: tuple[Rule, ...]
    fields: Mapping[str, str]
    final_norm: str
    head: str
    embedding: str
    centred: bool
    norm_bias: bool
    harmless: tuple[str, ...]
    gain_offset: float = 0.0
    head_bias: bool = False
    former: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    embedding_norm: bool = False
    experts: Layout = field(default_factory=Layout)
    width: Callable[[RiGPTConfig, int], int] | None = None

    @property
    def final_gain(self) -> bool:
        """Whether the norm in front of the head has gains."""
        return any(rule.norm == self.final_norm for rule in self.rules)

    def varied(
        self, name: str, rules: Mapping[str, Mapping[str, Any] | None] | None = None, **changes: Any
    ) -> "Family":
        """
        A family of its own that differs from this one in little.

        Args:
            name (`str`): what error messages call it.
            rules (`Mapping[str, Mapping[str, Any] | None]`, *optional*): changes of rules, by the last part of their
                targets; `None` leaves a rule out.
            changes: of the family's other fields.
        """
        left, changed = dict(rules or {}), []
        for rule in self.rules:
            change = left.pop(rule.target.rpartition(".")[2], {})
            changed += [] if change is None else [replace(rule, **change)]
        assert not left, f"no rule of {self.name} makes {', '.join(left)}"
        return replace(self, name=name, rules=tuple(changed), **changes)

    def expand(self, config: RiGPTConfig) -> Iterator[tuple[Rule, int]]:
        """All rules, each with the number of its layer (-1 outside of the layers)."""
        for rule in self.rules:
            if "{i}" in rule.target:
                yield from ((rule.at(layer), layer) for layer in range(config.num_hidden_layers))
            else:
                yield rule, -1

    def rigpt_fields(self, config: Any) -> dict[str, Any]:
        """The fields of a RiGPT that a stock configuration has under its own names."""
        named = {ours: getattr(config, theirs) for ours, theirs in {**self.fields, **self.options}.items()}
        return {ours: OFF.get(ours) if value is None else value for ours, value in named.items()}

    def stock_fields(self, config: RiGPTConfig) -> dict[str, Any]:
        """The fields of a stock configuration that a RiGPT has."""
        return {theirs: getattr(config, ours) for ours, theirs in self.fields.items()}


@dataclass(frozen=True)
class Architecture:
    """
    A stock class to convert.

    Args:
        class_name (`str`): its name.
        family (`Family`): its weight map.
        rigpt_config (`Callable`): reads the configuration of a source that is not refused, see [`result`].
        refused (`Mapping[str, Callable]`, *optional*): options that have no exact form; `config -> str | None`: what
            there is to say where a configuration has them in use.
        variant (`Callable`, *optional*): `config -> Family`: the weight map where it depends on the configuration.
    """

    class_name: str
    family: Family
    rigpt_config: Callable[[Any, str | None], RiGPTConfig]
    refused: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)
    variant: Callable[[Any], Family] | None = None

    def result(self, config: Any, dropout: str | None = "vector") -> RiGPTConfig:
        """
        The configuration of the RiGPT equal to a model with this one.

        Args:
            config (`PreTrainedConfig`): the source's configuration.
            dropout (`str`, *optional*, defaults to `"vector"`): see [`vector_dropout`].

        Raises:
            ValueError: if an option of the source has no exact form; the message names it.
        """
        for words in self.refused.values():
            if message := words(config):
                raise ValueError(message)
        result = self.rigpt_config(config, dropout)
        result.converted_from = config.model_type
        return result

    def family_of(self, config: Any) -> Family:
        """The weight map of a model with this configuration."""
        return self.family if self.variant is None else self.variant(config)


@dataclass(frozen=True)
class Target:
    """
    A stock class to export to.

    What neither the family's fields nor `expresses` declare must be at its default, or at weights that do nothing.

    Args:
        name (`str`): what error messages call it.
        model_class (`type`): the class.
        family (`Family`): its weight map; whatever value a field of it has is carried over. Constants that its
            configuration has are best 1 in `stock_config`; the weights take over all others.
        expresses (`Mapping[str, Callable | None]`): other fields of `RiGPTConfig`; `config -> bool`: whether it has a
            value that the class can express, `None` if it can all.
        stock_config (`Callable`): the configuration of the class equal to a RiGPT's, but for
            `tie_word_embeddings`, which the weights decide.
        summary (`str`): what the class has, for error messages.
        constants (`Mapping[str, float]`, *optional*): tensors of the class that no module of RiGPT is in, by name with
            `{i}` for the number of the layer, and the value of all of their entries.
        variant (`Callable`, *optional*): `config -> Family`: the weight map where it depends on the stock
            configuration.
    """

    name: str
    model_class: Any
    family: Family
    expresses: Mapping[str, Callable[[RiGPTConfig], bool] | None]
    stock_config: Callable[[RiGPTConfig], Any]
    summary: str
    constants: Mapping[str, float] = field(default_factory=dict)
    variant: Callable[[Any], Family] | None = None

    def family_of(self, config: Any) -> Family:
        """The weight map of a model with this stock configuration."""
        return self.family if self.variant is None else self.variant(config)

    def constant(self, name: str) -> float | None:
        """The value of a tensor that is one of `constants`."""
        return self.constants.get(re.sub(r"\.\d+\.", ".{i}.", name, count=1))


def module_of(name: str) -> tuple[str, str]:
    """The module of a parameter, and "weight" or "bias"; one in no module of its own is the weight of its name."""
    module, _, kind = name.rpartition(".")
    return (module, kind) if kind in ("weight", "bias") else (name, "weight")


def only(option: str, expressed: tuple, reason: str, advice: str) -> dict[str, Callable[[Any], str | None]]:
    """A refusal of every value of an option but a few, for `Architecture.refused`."""

    def words(config: Any) -> str | None:
        value = getattr(config, option)
        return None if value in expressed else f"`{option}={value}` cannot be converted: {reason}. {advice}."

    return {option: words}


def same(*names: str) -> dict[str, str]:
    """Fields that a family calls as we do."""
    return {name: name for name in names}
