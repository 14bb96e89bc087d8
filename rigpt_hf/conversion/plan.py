"""A conversion before it happens: every tensor of the RiGPT, its shape, and the recipe that makes it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from ..checkpoints.weights import Weights, name_some
from ..checkpoints.write import Entry, finer_dtype
from ..configuration_rigpt import RiGPTConfig
from ..frames import Table, table_of
from ..modeling_rigpt import RiGPTForCausalLM
from .experts import with_experts
from .folds import extended, fold_reader, fold_reader_bias, fold_rows, fold_writer, projection
from .gains import metric_maps, rows_of_heads, with_form
from .maps import Architecture, Family, Rule, module_of


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
    buffers: Mapping[str, torch.Tensor] | None = None,
    qk_gain: str = "vector",
) -> Plan:
    """
    Match a source's tensors to a RiGPT's, with nothing left over on either side.

    Args:
        architecture (`Architecture`): the source's entry in the table.
        config (`PreTrainedConfig`): the source's configuration.
        source (`Weights`): the source's weights.
        dropout (`str`, defaults to `"vector"`): see [`convert_model`].
        device (`torch.device` or `str`, defaults to `"cpu"`): where tensors made of nothing are put.
        buffers (`Mapping[str, torch.Tensor]`, *optional*): of a source in memory, also those that no checkpoint holds.
        qk_gain (`str`, defaults to `"vector"`): see [`convert_model`].

    Raises:
        ValueError: if an option or a tensor of the source has no place in RiGPT, or one of RiGPT's is missing from the
            source; the message names it.
    """
    rigpt_config = architecture.result(config, dropout)
    family = architecture.family_of(config)
    reader = _Reader(family, config, with_experts(source, config, family.experts), str(device), buffers or {})
    rules = {rule.target: (rule, layer) for rule, layer in family.expand(rigpt_config)}
    reader.norms = {name: norm for name, norm in rules.items() if norm[0].gain}
    rigpt_config = with_form(rigpt_config, qk_gain, reader.all_head_gains())
    reader.table, reader.metric = table_of(rigpt_config), rigpt_config.qk_norm_gain == "metric"
    reader.head_dim = rigpt_config.head_dim
    with torch.device("meta"):
        model = RiGPTForCausalLM(rigpt_config)
    tied = set(model._tied_weights_keys) if rigpt_config.tie_word_embeddings else set()
    entries = []
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        module, kind = module_of(name)
        if module not in rules:
            raise ValueError(f"`{name}` of RiGPT has no rule in the weight map of {family.name}.")
        rule, layer = rules[module]
        entries.append(reader.entry(name, tuple(tensor.shape), rule, layer, kind == "bias"))
    reader.check_all_used()
    return Plan(rigpt_config, tuple(entries), reader.finest_dtype())


class _Reader:
    """Turns rules into recipes and keeps account of the source keys they use."""

    def __init__(
        self,
        family: Family,
        config: Any,
        source: Weights,
        device: str,
        buffers: Mapping[str, torch.Tensor],
    ):
        self.family, self.config, self.source, self.device, self.buffers = family, config, source, device, buffers
        self.table: Table
        self.metric, self.head_dim = False, 0
        # The rules of the norms of heads, with their layers.
        self.norms: dict[str, tuple[Rule, int]] = {}
        self.used: set[str] = set()
        # `...Model` checkpoints leave the prefix out of every name.
        keys = source.shapes
        prefix = "" if any(key.startswith(family.prefix) for key in keys) else family.prefix
        self.names = {}
        for key in keys:
            former = next((former for former in family.former if key.startswith(former)), "")
            name = family.former.get(former, "") + key[len(former) :]
            self.names[name if name.startswith(f"{family.head}.") else prefix + name] = key

    def finest_dtype(self) -> torch.dtype:
        """The dtype in which no tensor that is used loses digits."""
        dtypes = {self.source.dtypes[self.names[name]] for name in self.used}
        return reduce(torch.promote_types, (dtype for dtype in dtypes if dtype.is_floating_point))

    def _require(self, name: str) -> str:
        if (bare := name.removesuffix(".weight")) in self.names:
            name = bare
        if name not in self.names:
            if prefix := next((key[: -len(name)] for key in self.source.shapes if key.endswith(f".{name}")), ""):
                raise ValueError(
                    f"`{name}` is missing from the source, whose keys begin with {prefix!r}: another model holds this "
                    "one. Save that part alone with `save_pretrained`."
                )
            raise ValueError(
                f"`{name}` is missing from the source. Its other keys match {self.family.name}; check that the "
                "checkpoint is complete and that its configuration belongs to it."
            )
        self.used.add(name)
        return name

    def _read(self, name: str | None, rule: Rule | None = None) -> torch.Tensor | None:
        """A tensor if there is one, or the part of it that `rule` names, as `[out, in]`."""
        if name is None:
            return None
        rows = None if rule is None or rule.rows is None else rule.rows(self.config)
        transposed = rule is not None and rule.transposed and name.endswith(".weight")
        tensor = self.source.read(self.names[name], rows, 1 if transposed else 0)
        return tensor.T if transposed else tensor

    def _gains(self, name: str | None, rule: Rule | None = None) -> torch.Tensor | None:
        """The gains of a norm, in float64."""
        stored = self._read(name, rule)
        return None if stored is None else stored.to(torch.float64) + self.family.gain_offset

    def all_head_gains(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The gains of the norms of heads, with their names."""
        for name, (rule, _) in self.norms.items():
            yield self._of_heads(rule, "weight")[0], self._head_gains(name)

    def _of_heads(self, rule: Rule, kind: str) -> list[str]:
        """The tensors of a norm of heads, which may have one each."""
        name = f"{rule.source}.{kind}"
        if "{head}" not in name:
            return [self._require(name)]
        before, _, after = name.partition("{head}")
        found = sum(other.startswith(before) and other.endswith(after) for other in self.names)
        return [self._require(f"{before}{head}{after}") for head in range(max(found, 1))]

    def _head_gains(self, norm: str, kind: str = "weight") -> torch.Tensor:
        """The gains of a norm of heads, or its biases, flat, in float64, with the constant that they take over."""
        rule, layer = self.norms[norm]
        stored = torch.cat([self.source.read(self.names[name]).flatten() for name in self._of_heads(rule, kind)])
        stored = stored if rule.rows is None else rule.rows(self.config).take(stored)
        stored = stored.to(torch.float64) + (self.family.gain_offset if kind == "weight" else 0.0)
        return stored * self._scale(rule, layer, torch.float64)

    def _scale(self, rule: Rule, layer: int, dtype: torch.dtype) -> float:
        """The constant of the stock model that a tensor takes over."""
        if rule.buffer is not None and rule.buffer in self.buffers:
            return float(self.buffers[rule.buffer])
        # The buffer of a checkpoint is made when it is loaded, in the dtype in which the certificate loads it.
        return rule.constant(
            self.config, layer, dtype if rule.buffer is None else finer_dtype(self.finest_dtype(), dtype)
        )

    def _head_dimension(self, name: str) -> int | None:
        """The axis of a parameter that has one more dimension for the bias of the head, if there is one."""
        ends = (turned.dim for turned in self.table.turns(name) if turned.key.kind in ("lexical", "output"))
        return next(ends, None) if self.family.head_bias else None

    def entry(self, name: str, shape: tuple[int, ...], rule: Rule, layer: int, is_bias: bool) -> Entry:
        """The recipe of one tensor; source keys are looked up now, read when it is made."""
        gain = self._require(f"{rule.norm}.weight") if rule.norm else None
        beta = self._require(f"{rule.norm}.bias") if rule.norm and self.family.norm_bias else None
        weight = bias = None
        if rule.gain:
            self._of_heads(rule, "bias" if is_bias else "weight")
        elif rule.source:
            weight = self._require(f"{rule.source}.weight")
            has_bias = is_bias and (rule.bias is None or rule.bias(self.config))
            bias = self._require(f"{rule.source}.bias") if has_bias else None
        head = self.head_dim if rule.behind and self.norms[rule.behind][0].mean else None
        role, centred = self.table.role_on(name, "stream"), self.family.centred
        lexical, head_bias, inner = self._head_dimension(name), None, list(shape)
        if lexical is not None:
            inner[lexical] -= 1
            if rule.source == (self.family.embedding if self.config.tie_word_embeddings else self.family.head):
                head_bias = self._require(f"{self.family.head}.bias")

        def fold(dtype: torch.dtype) -> torch.Tensor:
            if rule.values is not None:
                return torch.tensor(rule.values(self.config), dtype=torch.float64, device=self.device).to(dtype)
            if rule.gain and is_bias:
                return rows_of_heads(self._head_gains(rule.target, "bias"), shape[0]).to(dtype)
            if rule.gain:
                head_gains = self._head_gains(rule.target)
                return metric_maps(head_gains, shape[0], shape[1], dtype) if self.metric else head_gains.to(dtype)
            scales = scale = self._scale(rule, layer, dtype)
            if rule.behind and self.metric:
                scales = scale * rows_of_heads(self._head_gains(rule.behind), shape[0])
            own = self._read(bias if is_bias else weight, rule)
            if rule.source is None and role == "writes" and rule.norm:  # an affine map into the stream of a norm alone
                own = self._read(beta) if is_bias else torch.diag(cast(torch.Tensor, self._gains(gain)))
            if is_bias and bias is None and beta is None:
                return torch.zeros(inner, dtype=dtype, device=self.device)
            if own is not None and role == "writes":
                return fold_writer(own, centred, scale, dtype)
            if is_bias:
                folded = self._read(weight, rule) if beta else None
                norm_bias = self._read(beta)
                own = norm_bias if weight is None else own
                return fold_reader_bias(own, folded, norm_bias, scales, dtype, head)
            gains = self._gains(gain)
            if own is None and gains is not None and len(shape) == 1:  # which stay gains
                return gains.to(dtype)
            if own is None:
                return projection(inner[0], gains, centred, scale, dtype, self.device)
            if role == "reads":
                return fold_reader(own, gains, centred, scales, dtype, head)
            return fold_rows(own, centred, scale, dtype) if role == "rows" else own.to(dtype)

        def make(dtype: torch.dtype) -> torch.Tensor:
            tensor = fold(dtype)
            if lexical is not None:
                last = self._read(head_bias)
                tensor = extended(tensor, lexical, torch.tensor(float(is_bias)) if last is None else last)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"`{name}` must have shape {list(shape)} by the source's configuration, its weights give "
                    f"{list(tensor.shape)}. The configuration does not belong to these weights."
                )
            return tensor.contiguous()

        folded = (rule.gain, rule.behind, rule.scale, gain, lexical is not None, role is not None and centred)
        own = weight if not is_bias else None
        return Entry(name, shape, make, None if any(folded) or own is None else self.source.dtypes[self.names[own]])

    def check_all_used(self) -> None:
        """Raise for source keys that no rule consumed."""
        family = self.family
        head = f"{family.head}.weight"
        if self.config.tie_word_embeddings and head in self.names:
            # A second copy of the tied table is harmless exactly if it is a copy.
            self.source.check_copy(self.names[head], self.names[f"{family.embedding}.weight"])
            self.used.add(head)
        harmless = re.compile("|".join(family.harmless))
        unknown = [self.names[name] for name in self.names if name not in self.used and not harmless.fullmatch(name)]
        if not unknown:
            return
        reason = "no place in RiGPT, and dropping it would change the function"
        if any(".q_norm." in name or ".k_norm." in name for name in unknown):
            reason = f"gains behind a q/k normalisation, which {family.name} has not"
        raise ValueError(f"the source has keys that cannot be converted: {name_some(unknown)}: {reason}.")
