"""A conversion before it happens: every tensor of the RiGPT, its shape, and the recipe that makes it."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints.read import Weights, name_some
from ..checkpoints.write import Entry
from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .families import Architecture
from .folds import fold_reader, fold_reader_bias, fold_rows, fold_writer, projection
from .maps import Family, Role, Rule


@dataclass(frozen=True)
class Plan:
    """The configuration of the result and its tensors, in the order in which they are made and stored."""

    config: RiGPTConfig
    entries: tuple[Entry, ...]
    source_dtype: torch.dtype


def make_plan(
    architecture: Architecture,
    config: PreTrainedConfig,
    source: Weights,
    dropout: str = "vector",
    device: torch.device | str = "cpu",
) -> Plan:
    """
    Match a source's tensors to a RiGPT's, with nothing left over on either side.

    Args:
        architecture (`Architecture`): the source's entry in the table.
        config (`PreTrainedConfig`): the source's configuration.
        source (`Weights`): the source's weights.
        dropout (`str`, defaults to `"vector"`): see [`convert_model`].
        device (`torch.device` or `str`, defaults to `"cpu"`): where tensors made of nothing are put.

    Raises:
        ValueError: if an option or a tensor of the source has no place in RiGPT, or one of RiGPT's is missing from the
            source; the message names it.
    """
    rigpt_config = architecture.rigpt_config(config, dropout)
    reader = _Reader(architecture.family, config, source, str(device))
    with torch.device("meta"):
        model = RiGPTForCausalLM(rigpt_config)
    rules = {rule.target: (rule, layer) for rule, layer in reader.rules()}
    tied = set(model._tied_weights_keys) if rigpt_config.tie_word_embeddings else set()
    entries = []
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        module, _, kind = name.rpartition(".")
        if module not in rules:
            raise ValueError(f"`{name}` of RiGPT has no rule in the weight map of {reader.family.name}.")
        rule, layer = rules[module]
        entries.append(reader.entry(name, tuple(tensor.shape), rule, layer, kind == "bias"))
    reader.check_all_used()
    return Plan(rigpt_config, tuple(entries), reader.dtype)


class _Reader:
    """Turns rules into recipes and keeps account of the source keys they use."""

    def __init__(self, family: Family, config: Any, source: Weights, device: str):
        self.family, self.config, self.source, self.device = family, config, source, device
        self.tied = config.tie_word_embeddings
        self.used: set[str] = set()
        # `...Model` checkpoints leave the prefix out of every name.
        keys = source.shapes
        self.prefix = "" if any(key.startswith(family.prefix) for key in keys) else family.prefix
        self.names = {key if key.startswith(f"{family.head}.") else self.prefix + key: key for key in keys}
        self.dtype = source.dtypes[self.names[self._require(f"{family.embedding}.weight")]]

    def rules(self):
        return self.family.expand(self.config.num_hidden_layers, self.tied)

    def _require(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(
                f"`{name}` is missing from the source. Its other keys match {self.family.name}; check that the "
                "checkpoint is complete and that its configuration belongs to it."
            )
        self.used.add(name)
        return name

    def _read(self, name: str, rule: Rule | None = None) -> torch.Tensor:
        """A tensor, or the part of it that `rule` names, as `[out, in]`."""
        part = (0, 1) if rule is None else rule.part
        transposed = rule is not None and name.endswith(".weight") and self.family.is_transposed(rule.source or "")
        tensor = self.source.read(self.names[name], part, 1 if transposed else 0)
        return tensor.T if transposed else tensor

    def entry(self, name: str, shape: tuple[int, ...], rule: Rule, layer: int, is_bias: bool) -> Entry:
        """The recipe of one tensor; source keys are looked up now, read when it is made."""
        gain = self._require(f"{rule.norm}.weight") if rule.norm else None
        beta = self._require(f"{rule.norm}.bias") if rule.norm and self.family.norm_bias else None
        weight = self._require(f"{rule.source}.weight") if rule.source else None
        bias = None
        if is_bias and rule.source:
            stored = f"{rule.source}.bias"
            bias = self._require(stored) if beta is None or stored in self.names else None

        def make(dtype: torch.dtype) -> torch.Tensor:
            scale = self.family.query_scale(self.config, layer) if rule.is_query else 1.0
            tensor = (
                self._make_bias(rule, weight, bias, beta, scale, dtype)
                if is_bias
                else self._make_weight(rule, weight, gain, scale, shape[0], dtype)
            )
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"`{name}` must have shape {list(shape)} by the source's configuration, its weights give "
                    f"{list(tensor.shape)}. The configuration does not belong to these weights."
                )
            return tensor.contiguous()

        return Entry(name, shape, make)

    def _make_weight(
        self, rule: Rule, weight: str | None, gain: str | None, scale: float, size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        centred = self.family.centred
        gains = self._read(gain) if gain else None
        if weight is None:
            return projection(size, gains, centred, dtype, self.device)
        tensor = self._read(weight, rule)
        match rule.role:
            case Role.COPY:
                return tensor.to(dtype)
            case Role.POSITIONS:
                return fold_rows(tensor, centred, dtype)
            case Role.WRITER:
                return fold_writer(tensor, centred, dtype)
            case _:
                return fold_reader(tensor, gains, centred, scale, dtype)

    def _make_bias(
        self, rule: Rule, weight: str | None, bias: str | None, beta: str | None, scale: float, dtype: torch.dtype
    ) -> torch.Tensor:
        own = self._read(bias, rule) if bias else None
        if rule.role is Role.WRITER:
            assert own is not None
            return fold_writer(own, self.family.centred, dtype)
        norm_bias = self._read(beta) if beta else None
        if weight is None:
            return fold_reader_bias(norm_bias, None, None, scale, dtype)
        return fold_reader_bias(own, self._read(weight, rule) if beta else None, norm_bias, scale, dtype)

    def check_all_used(self) -> None:
        """Raise for source keys that no rule consumed."""
        family = self.family
        head = f"{family.head}.weight"
        if self.tied and head in self.names:
            # A second copy of the tied table is harmless exactly if it is a copy.
            self.source.check_copy(self.names[head], self.names[f"{family.embedding}.weight"])
            self.used.add(head)
        harmless = re.compile("|".join(family.harmless))
        unknown = [self.names[name] for name in self.names if name not in self.used and not harmless.fullmatch(name)]
        if not unknown:
            return
        reason = "no place in RiGPT, and dropping it would change the function"
        if any(".q_norm." in name or ".k_norm." in name for name in unknown):
            reason = "a gain per coordinate behind the q/k normalisation, which folds into no weight"
        raise ValueError(f"the source has keys that cannot be converted: {name_some(unknown)}: {reason}.")
