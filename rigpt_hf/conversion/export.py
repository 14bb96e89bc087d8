"""`export_model`: a RiGPT becomes an unmodified stock model, through the same weight maps read backwards.

Shapes: V vocabulary, D lexical, d stream of the RiGPT, S stream of the stock model, n other sizes. The stock stream is
reached by `x_stock = Qᵀ x` with Q `[d, S]`, an isometry on everything that is ever written into the stream. Then
readers turn into `W Q`, writers into `Qᵀ W`, positions into `P Q`.

A stream with more dimensions (GPT-2's, where the RiGPT uses all of its d) has another mean: the stock norm is
`eps d/S` and its gains are `√(d/S)` times what they were. Heads with more dimensions have zeros there, and queries
`√(h'/h)` times as long, as the stock score is divided by `√h'`.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.weights import name_some
from ..checkpoints.write import Entry
from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.local_frames import to_global_frame
from .assemble import assemble
from .families import TARGETS, refuse_adapter
from .frames import ENDS, StockFrame, choose_frame
from .maps import Family, Rule, Target
from .neutral import refuse_options


def export_model(
    model: RiGPTForCausalLM, target: str = "gpt2", *, frame: str = "auto", dtype: torch.dtype | None = None
) -> Any:
    """
    The stock model that computes the same function as a RiGPT, exactly up to rounding.

    A stock stream has a frame of its own, and for GPT-2 also a direction that LayerNorm removes. `frame="lexical"`
    expresses the stream in the frame of the embeddings through `project_in`; this undoes a conversion and any rotation
    since, and keeps embeddings tied where `project_out` is still a gain in that frame. `frame="stream"` keeps the
    stream as it is and multiplies the projections into the token tables, which unties them; for GPT-2 the direction
    that no weight writes into is first reflected onto `1/√d`.

    Args:
        model (`RiGPTForCausalLM`): the source; not changed.
        target (`str`, defaults to `"gpt2"`): "gpt2", "llama" or "qwen2".
        frame (`str`, defaults to `"auto"`): "lexical", "stream", or "auto": the first of the two that is exact.
        dtype (`torch.dtype`, *optional*): of the result; the source's if not given.

    Returns:
        `GPT2LMHeadModel`, `LlamaForCausalLM` or `Qwen2ForCausalLM`, on the source's device and in its mode.

    Raises:
        ValueError: if the target cannot express an option or the weights; the message names which and why.
    """
    refuse_adapter(model, "model")
    plan = plan_export(model, target, frame)
    dtype, backend = dtype or model.dtype, model.config._attn_implementation
    if backend not in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
        backend = "sdpa"
    tensors = {entry.name: entry.make(dtype) for entry in plan.entries}
    return assemble(plan.model_class, plan.config, tensors, dtype, model, backend)


@dataclass(frozen=True)
class ExportPlan:
    """The stock class and configuration of a result, and its tensors in the order of its state dict."""

    model_class: Any
    config: Any
    entries: tuple[Entry, ...]


def plan_export(model: RiGPTForCausalLM, target: str, frame: str = "auto") -> ExportPlan:
    """
    Match a RiGPT's tensors to a stock model's, with nothing left over on either side.

    Args:
        model, target, frame: as for [`export_model`].

    Raises:
        ValueError: if the target cannot express an option or the weights; the message names which and why.
    """
    if target not in TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(TARGETS)}, got {target!r}.")
    if model.config.local_frames:
        model = to_global_frame(model)
    chosen, config = TARGETS[target], model.config
    tied = model._tied_weights_keys if config.tie_word_embeddings else ()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    idle = refuse_options(config, state, chosen, TARGETS)
    stock_frame = choose_frame(config, state, chosen.family, frame)
    wide = _widened(config, chosen.family, len(stock_frame.gain))
    stock_config = chosen.stock_config(wide)
    stock_config.tie_word_embeddings = stock_frame.head is None
    with torch.device("meta"):
        skeleton = chosen.model_class(stock_config)
    used = {name: tensor for name, tensor in state.items() if name not in idle}
    unfolding = _Unfolding(chosen, config, wide, stock_frame, used, stock_config)
    return ExportPlan(chosen.model_class, stock_config, unfolding.entries(skeleton.state_dict()))


def _widened(config: RiGPTConfig, family: Family, size: int) -> RiGPTConfig:
    """The sizes of a RiGPT in a stock stream of this size."""
    wide = copy.copy(config)
    wide.hidden_size, wide.rms_norm_eps = size, config.rms_norm_eps * config.hidden_size / size
    if family.width is not None:
        wide.head_dim = size // config.num_attention_heads
    return wide


class _Unfolding:
    """Turns rules into recipes for stock tensors and keeps account of the RiGPT's that they use."""

    def __init__(
        self,
        target: Target,
        config: RiGPTConfig,
        wide: RiGPTConfig,
        frame: StockFrame,
        state: dict[str, torch.Tensor],
        stock_config: Any,
    ):
        self.target, self.family, self.frame = target, target.family, frame
        self.config, self.wide, self.state, self.stock_config = config, wide, state, stock_config
        self.table = table_of(config)
        self.scale = (config.hidden_size / wide.hidden_size) ** 0.5
        family = target.family
        rules = [rule for rule, _ in family.expand(config)]
        # The ends of the stream, which `choose_frame` has placed.
        ends = (None, family.embedding, family.head)
        self.used = {f"{module}.{kind}" for module in ENDS for kind in ("weight", "bias")}
        self.norms = {rule.norm for rule in rules} - {family.final_norm}
        self.rules: dict[str, list[Rule]] = {}
        for rule in rules:
            if rule.source is not None and rule.source not in ends:
                self.rules.setdefault(rule.source, []).append(rule)

    def entries(self, skeleton: dict[str, torch.Tensor]) -> tuple[Entry, ...]:
        """The recipes of a stock model's tensors: every one of them, from every one of the RiGPT's."""
        entries = []
        for name, example in skeleton.items():
            module, _, kind = name.rpartition(".")
            if module != self.family.head or self.frame.head is not None:
                entries.append(self._entry(name, module, kind, tuple(example.shape)))
        if unused := set(self.state) - self.used:
            raise ValueError(f"{name_some(unused)} of the source has no place in {self.family.name}.")
        return tuple(entries)

    def _entry(self, name: str, module: str, kind: str, shape: tuple[int, ...]) -> Entry:
        family, frame = self.family, self.frame
        rules = self.rules.get(module, [])
        placed = {
            f"{family.embedding}.weight": frame.embedding,
            f"{family.head}.weight": frame.head,
            f"{family.final_norm}.weight": frame.gain * self.scale,
            f"{family.final_norm}.bias": frame.bias,
        }.get(name)
        constant = self.target.constant(name)
        if placed is None and constant is None and not rules and module not in self.norms:
            raise ValueError(f"`{name}` of the target has no rule in the weight map of {family.name}.")
        self.used.update(f"{rule.target}.{kind}" for rule in rules)

        def make(dtype: torch.dtype) -> torch.Tensor:
            if placed is not None:
                tensor = placed
            elif rules:
                tensor = self._joined(rules, kind, shape)
            elif constant is not None:
                tensor = torch.full(shape, constant, dtype=torch.float64)
            else:
                tensor = torch.full(shape, self.scale if kind == "weight" else 0.0, dtype=torch.float64)
            if tensor.shape != shape:
                raise ValueError(
                    f"`{name}` of the target must have shape {list(shape)}, the source gives {list(tensor.shape)}."
                )
            return tensor.to(dtype).contiguous().clone()

        return Entry(name, shape, make)

    def _joined(self, rules: list[Rule], kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A stock module's weight or bias from all RiGPT modules that are in it."""
        transposed = kind == "weight" and rules[0].transposed
        parts = [self._turned(f"{rule.target}.{kind}") for rule in rules]
        if rules[0].rows is None and parts[0] is not None:
            return parts[0].T if transposed else parts[0]
        # Zeros are a bias that is absent.
        whole = torch.zeros(shape[::-1] if transposed else shape, dtype=torch.float64, device=self.frame.gain.device)
        for rule, part in zip(rules, parts, strict=True):
            if rule.rows is not None and part is not None:
                rule.rows(self.stock_config).place(part, whole)
        return whole.T if transposed else whole

    def _turned(self, name: str) -> torch.Tensor | None:
        """One RiGPT tensor in the stock frame, in float64; `None` for a bias that is absent."""
        if name not in self.state:
            return None
        tensor = self._with_wide_heads(name, self.state[name].to(torch.float64))
        match self.table.role_on(name, "stream"):
            case "reads" | "rows":
                return self.frame.read(tensor)
            case "writes":
                return self.frame.write(tensor)
        return tensor

    def _with_wide_heads(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with as many dimensions per head as the stock model has, zeros in those that are new."""
        size, wide = self.config.head_dim, self.wide.head_dim
        if size == wide:
            return tensor
        for turned in self.table.turns(name):
            if turned.key.kind in ("head_qk", "head_vo"):
                heads = turned.unfold(tensor).unflatten(0, (-1, size))
                padded = torch.nn.functional.pad(heads, (0, 0, 0, wide - size)).flatten(0, 1)
                shape = list(tensor.shape)
                shape[turned.dim] = len(padded)
                tensor = turned.fold(padded, torch.Size(shape))
                if (turned.key.kind, turned.role) == ("head_qk", "vector"):
                    tensor = tensor * (wide / size) ** 0.5
        return tensor
