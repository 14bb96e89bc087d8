"""`export_model`: a RiGPT becomes an unmodified stock model, through the same weight maps read backwards.

Shapes: V vocabulary, D lexical, d stream of the RiGPT, S stream of the stock model, n other sizes. The stock stream is
reached by `x_stock = Qᵀ x` with Q `[d, S]`, an isometry on everything that is ever written into the stream. Then
readers turn into `W Q`, writers into `Qᵀ W`, positions into `P Q`.

A stream with more dimensions (GPT-2's, where the RiGPT uses all of its d) has another mean: the stock norm is
`eps d/S` and its gains are `√(d/S)` times what they were. Heads with more dimensions have zeros there, and queries
`√(h'/h)` times as long, as the stock score is divided by `√h'`.

The gains of a stock norm are free, as what reads it can be divided by them. They are chosen so that rounding to a few
bits, with a scale per group of neighbours in a row, does little harm: see [`even_gains`].
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import logging

from ..checkpoints.read import silent
from ..checkpoints.weights import name_some
from ..checkpoints.write import Entry
from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.local_frames import to_global_frame
from ..terminal import notices_held, say_notices
from .assemble import assemble
from .biases import in_stock_order, settled, without_bias
from .experts import fused
from .families import TARGETS, refuse_adapter
from .frames import ENDS, StockFrame, choose_frame
from .head_norms import in_stock_norms
from .maps import Family, Rule, Target, module_of
from .neutral import NAMED, able_targets, fault, joined, nearest, refuse_options, refused_options


logger = logging.get_logger(__name__)

# Attention of stock classes, and what says of a class whether it has it.
BACKENDS = {
    "eager": "",
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
# Where a message says what else to do.
ELSEWHERE = "`rigpt families` says what classes have; keep this model as RiGPT"
# Gains of an export are between 2 to the power of minus this and 2 to the power of it.
LARGEST_EXPONENT = 8


def export_model(
    model: RiGPTForCausalLM, target: str | None = None, *, frame: str = "auto", dtype: torch.dtype | None = None
) -> Any:
    """
    The stock model that computes the same function as a RiGPT, exactly up to rounding.

    A stock stream has a frame of its own, and for GPT-2 also a direction that LayerNorm removes. `frame="lexical"`
    expresses the stream in the frame of the embeddings through `project_in`; this undoes a conversion and any rotation
    since, and keeps embeddings tied where `project_out` is still a gain in some frame. `frame="stream"` keeps the
    stream as it is and multiplies the projections into the token tables, which unties them; for GPT-2 a direction
    that no weight writes into is first reflected onto `1/√d`, and if there is none the stream gets another one for
    each head.

    Args:
        model (`RiGPTForCausalLM`): the source; not changed.
        target (`str`, *optional*): a key of `rigpt_hf.conversion.families.TARGETS`, such as "llama"; "auto" for that
            in which the model is smallest, which a warning names; the class that it was converted from if not given.
        frame (`str`, defaults to `"auto"`): "lexical", "stream", or "auto": the first of the two that is exact.
        dtype (`torch.dtype`, *optional*): of the result; the source's if not given.

    Returns:
        `PreTrainedModel`: of the target's class, on the source's device and in its mode.

    Raises:
        ValueError: if the target cannot express an option or the weights; the message names which and why.
    """
    refuse_adapter(model, "model")
    plan = plan_export(model, target, frame)
    dtype, backend = dtype or model.dtype, model.config._attn_implementation
    if backend not in BACKENDS:
        backend = "sdpa"
    if not getattr(plan.model_class, BACKENDS[backend], True):
        backend = "eager"
    tensors = {entry.name: entry.make(dtype) for entry in plan.entries}
    return assemble(plan.model_class, plan.config, tensors, dtype, model, backend)


@dataclass(frozen=True)
class ExportPlan:
    """The stock class and configuration of a result, and its tensors in the order of its state dict."""

    model_class: Any
    config: Any
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Numbers in all matrices that are stored: some classes store biases that are zero besides."""
        return sum(math.prod(entry.shape) for entry in self.entries if len(entry.shape) > 1)


def plan_export(
    model: RiGPTForCausalLM, target: str | None = None, frame: str = "auto", even: bool = True
) -> ExportPlan:
    """
    Match a RiGPT's tensors to a stock model's, with nothing left over on either side.

    Args:
        model, target, frame: as for [`export_model`].
        even (`bool`, defaults to `True`): choose the gains of norms by [`even_gains`]; if not they are 1 inside of
            layers, and weights stay on the grid that they were rounded to.

    Raises:
        ValueError: if the target cannot express an option or the weights; the message names which and why.
    """
    if target not in (None, "auto", *TARGETS):
        raise ValueError(f"`target` must be one of auto, {', '.join(TARGETS)}, got {target!r}.")
    if model.config.local_frames:
        model = to_global_frame(model)
    config = model.config
    tied = model._tied_weights_keys if config.tie_word_embeddings else ()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    if target == "auto":
        return _best_plan(config, state, frame, even)
    return _plan(config, state, target or _origin(config, state), frame, even)


def _origin(config: RiGPTConfig, state: dict[str, torch.Tensor]) -> str:
    """The target that a model was converted from, as it is recorded."""
    origin = config.converted_from
    if origin in TARGETS:
        return origin
    record = "no record of its class" if origin is None else f"come from {origin!r}, to which there is no way back"
    if able := able_targets(config, state, TARGETS):
        advice = (
            f"Take {joined([repr(name) for name in able], 'or')}, which {'has' if len(able) == 1 else 'have'} its "
        )
        advice += "options, or 'auto' for the class in which it is smallest"
    else:
        reasons = {name: refused_options(config, state, target) for name, target in TARGETS.items()}
        advice = f"No class has all of its options: {nearest(reasons)}. {ELSEWHERE}"
    raise ValueError(f"`target` must be named for a model that has {record}, and none was given. {advice}.")


def _best_plan(config: RiGPTConfig, state: dict[str, torch.Tensor], frame: str, even: bool) -> ExportPlan:
    """
    The plan in which a model is smallest; if several that of the class that it was converted from, or of the first in
    the order of targets. Says why.
    """
    plans: dict[str, ExportPlan] = {}
    notices: dict[str, list] = {}
    refused: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        refused[name] = refused_options(config, state, target)
        if not refused[name]:
            try:
                with notices_held(__name__.rpartition(".")[0]) as notices[name]:
                    plans[name] = _plan(config, state, name, frame, even)
            except ValueError as error:
                refused[name] = [fault(error)]
    if not plans:
        raise ValueError(
            f"`target` must be a class that has all options of this model, and there is none: {nearest(refused)}. "
            f"{ELSEWHERE}."
        )
    best = min(plans, key=lambda name: (plans[name].size, name != config.converted_from))
    kept = "tied embeddings" if plans[best].config.tie_word_embeddings else "a head of its own"
    others = [f"{name} with {plan.size:,}" for name, plan in plans.items() if name != best]
    others[NAMED:] = [f"{len(others) - NAMED} more"] if len(others) > NAMED else []
    compared = f"no more than {', '.join(others)}" if others else "and no other class has its options"
    logger.warning(
        f"`target='auto'` is {best!r}: it is exact with {kept} and {plans[best].size:,} numbers in matrices, "
        f"{compared}."
    )
    say_notices(notices[best])
    return plans[best]


def _plan(config: RiGPTConfig, state: dict[str, torch.Tensor], name: str, frame: str, even: bool) -> ExportPlan:
    target = TARGETS[name]
    idle = refuse_options(config, state, target, TARGETS)
    stock_frame = choose_frame(config, state, target.family, frame)
    wide = _widened(config, target.family, len(stock_frame.gain))
    stock_config = target.stock_config(wide)
    stock_config.tie_word_embeddings = stock_frame.head is None
    with torch.device("meta"), silent():  # a class warns of kernels that it could use
        skeleton = target.model_class(stock_config).state_dict()
    used = {name: tensor for name, tensor in state.items() if name not in idle}
    family = target.family_of(stock_config)
    used = in_stock_norms(config, in_stock_order(config, used, family, stock_config), family, skeleton)
    used = settled(config, used, family, skeleton)
    moved = {name for name in without_bias(config, family, skeleton) if name in used and used[name].any()}
    unfolding = _Unfolding(target, family, config, wide, stock_frame, used, moved, stock_config, even)
    return ExportPlan(target.model_class, stock_config, unfolding.entries(skeleton))


def even_gains(sizes: torch.Tensor) -> torch.Tensor:
    """
    The gains `[n]` of a norm whose readers have columns of these sizes `[n]` (squares, summed), as powers of two.

    A scale of a few bits is shared by neighbours in a row, so a long column costs its neighbours their digits; divided
    by gains like their lengths, columns are alike. Powers of two, so that no weight is rounded on the way.
    """
    # A column of zeros may have any gain.
    exponents = sizes.clamp_min(float(sizes.amax()) * 1e-12 + 1e-30).log2() / 2
    exponents = exponents - exponents.mean()
    return torch.exp2(exponents.round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT))


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
        family: Family,
        config: RiGPTConfig,
        wide: RiGPTConfig,
        frame: StockFrame,
        state: dict[str, torch.Tensor],
        moved: set[str],
        stock_config: Any,
        even: bool,
    ):
        self.even = even
        self.target, self.family = target, family
        self.config, self.wide, self.state, self.stock_config = config, wide, state, stock_config
        self.table, self.named = table_of(config), {module_of(name): name for name in state}
        self.scale = (config.hidden_size / wide.hidden_size) ** 0.5
        # The ends of the stream, which `choose_frame` has placed.
        ends = (None, family.embedding, family.head)
        self.used = {f"{module}.{kind}" for module in ENDS for kind in ("weight", "bias")}
        # Constants of the class, by the module of ours that takes them over; that of embeddings is in a buffer.
        self.constants: dict[str, float] = {}
        self.rules: dict[str, list[Rule]] = {}
        # The heads whose norms are modules of their own.
        self.heads: dict[str, int] = {}
        # What reads each norm, and the gains that it is divided by.
        self.readers: dict[str, list[Rule]] = {}
        self.gains: dict[str, torch.Tensor] = {}
        # Biases that weights take over, and the norms in front of those, which then have some.
        self.moved, self.biased = moved, set[str]()
        # Norms behind blocks, whose gains are ours, and the one behind embeddings.
        self.behind: dict[str, str] = {}
        self.inner = next((rule.norm for rule in family.rules if rule.target == "model.embedding_map"), None)
        for rule, layer in family.expand(config):
            self.constants[rule.target] = rule.constant(stock_config, layer, torch.float64)
            self.used |= set() if rule.values is None else {f"{rule.target}.weight"}
            if rule.source is not None and rule.source not in ends:
                sources = [rule.source]
                if "{head}" in rule.source:
                    count = len(state[f"{rule.target}.weight"]) // config.head_dim
                    sources = [rule.source.replace("{head}", str(head)) for head in range(count)]
                    self.heads |= {source: head for head, source in enumerate(sources)}
                for source in sources:
                    self.rules.setdefault(source, []).append(rule)
                if rule.norm is not None:
                    self.readers.setdefault(rule.norm, []).append(rule)
                    self.biased |= {rule.norm} if f"{rule.target}.bias" in moved else set()
            elif rule.source is None and rule.norm is not None and layer >= 0:
                self.behind[rule.norm] = f"{rule.target}.weight"
        if frame.head is not None and family.final_gain and even:
            gain = even_gains(frame.head.square().sum(0))
            frame = replace(frame, gain=frame.gain * gain, bias=frame.bias * gain, head=frame.head / gain)
        self.frame = frame

    def entries(self, skeleton: dict[str, torch.Tensor]) -> tuple[Entry, ...]:
        """The recipes of a stock model's tensors: every one of them, from every one of the RiGPT's."""
        entries = []
        for name, example in skeleton.items():
            if parts := self.family.experts.shapes(name, tuple(example.shape)):
                made = [self._entry(part, *module_of(part), shape) for part, shape in parts.items()]
                entries.append(fused(name, tuple(example.shape), made, self.family.experts))
                continue
            module, kind = module_of(name)
            if name != f"{self.family.head}.weight" or self.frame.head is not None:
                entries.append(self._entry(name, module, kind, tuple(example.shape)))
        if unused := set(self.state) - self.used:
            raise ValueError(f"{name_some(unused)} of the source has no place in {self.family.name}.")
        return tuple(entries)

    def _entry(self, name: str, module: str, kind: str, shape: tuple[int, ...]) -> Entry:
        family = self.family
        rules = self.rules.get(module, [])
        placed = module in (family.embedding, family.final_norm, family.head, self.inner)
        constant = self.target.constant(name)
        if not placed and constant is None and not rules and not {module} & {*self.readers, *self.behind}:
            raise ValueError(f"`{name}` of the target has no rule in the weight map of {family.name}.")
        self.used.update({self.named.get((rule.target, kind), "") for rule in rules} | self.moved)
        self.used.update([self.behind[module]] if module in self.behind else [])

        def make(dtype: torch.dtype) -> torch.Tensor:
            if placed:
                tensor = self._placed(module, kind, dtype)
            elif rules and rules[0].gain:
                tensor = self._of_heads(module, kind, shape)
            elif rules:
                tensor = self._joined(rules, kind, shape)
            elif constant is not None:
                tensor = torch.full(shape, constant, dtype=torch.float64)
            elif module in self.behind:
                tensor = self.state[self.behind[module]].to(torch.float64) - family.gain_offset
            else:
                gain = self._gain(module)
                bias = gain if module in self.biased else torch.zeros_like(gain)
                tensor = gain * self.scale - family.gain_offset if kind == "weight" else bias
            if tensor.shape != shape:
                raise ValueError(
                    f"`{name}` of the target must have shape {list(shape)}, the source gives {list(tensor.shape)}."
                )
            return tensor.to(dtype).contiguous().clone()

        return Entry(name, shape, make)

    def _placed(self, module: str, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """A weight or bias at one of the ends of the stream, in a model of this dtype."""
        family, frame = self.family, self.frame
        scale = next(rule for rule in family.rules if rule.target == ENDS[0]).constant(self.stock_config, -1, dtype)
        if module == family.embedding:
            return frame.embedding / scale
        if module == family.head:
            if kind == "bias":
                return frame.head_bias
            assert frame.head is not None
            return frame.head
        if module == self.inner:
            assert frame.inner is not None
            return frame.inner[0] if kind == "weight" else frame.inner[1]
        # The table of embeddings is divided by their constant, and the head too if it is that table.
        scale = scale if frame.head is None else 1.0
        return frame.gain * self.scale * scale - family.gain_offset if kind == "weight" else frame.bias * scale

    def _joined(self, rules: list[Rule], kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A stock module's weight or bias from all RiGPT modules that are in it."""
        transposed = kind == "weight" and rules[0].transposed
        parts: list[torch.Tensor | None]
        if kind == "weight" and rules[0].norm is not None:
            gain = self._gain(rules[0].norm)
            parts = [self._reading(rule) / gain for rule in rules]
        else:
            parts = [self._turned(rule.target, kind) for rule in rules]
        if rules[0].rows is None and parts[0] is not None:
            return parts[0].T if transposed else parts[0]
        # A bias that is absent is 0.
        whole = torch.zeros(shape[::-1] if transposed else shape, dtype=torch.float64, device=self.frame.gain.device)
        for rule, part in zip(rules, parts, strict=True):
            if rule.rows is not None and part is not None:
                rule.rows(self.stock_config).place(part, whole)
        return whole.T if transposed else whole

    def _of_heads(self, module: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The gains of a norm of heads, or of one head, or its biases, which are 0 where they are absent."""
        (rule,) = self.rules[module]
        part = self._turned(rule.target, kind)
        if part is None:
            return self.frame.gain.new_zeros(shape)
        if module in self.heads:
            part = part.unflatten(0, (-1, self.config.head_dim))[self.heads[module]]
        if rule.rows is not None:
            part, taken = torch.empty_like(part), part
            rule.rows(self.stock_config).place(taken, part)
        return part.reshape(shape) - (self.family.gain_offset if kind == "weight" else 0.0)

    def _gain(self, norm: str) -> torch.Tensor:
        """The gains of a norm inside the layers, `[S]`."""
        if norm not in self.gains:
            columns = [self._reading(rule).square().sum(0) for rule in self.readers[norm] if self._is_there(rule)]
            sizes = torch.stack(columns).sum(0)
            self.gains[norm] = even_gains(sizes) if self.even else torch.ones_like(sizes)
        return self.gains[norm]

    def _is_there(self, rule: Rule) -> bool:
        """Whether a RiGPT has a module: not where layers have experts, or have none."""
        return (rule.target, "weight") in self.named

    def _reading(self, rule: Rule) -> torch.Tensor:
        """
        The reader of a norm, before it is divided by the gains, `[n, S]`.

        A norm that centres leaves out what is the same in a row. Where its biases are its gains `g`, that comes back:
        `(W C + b 1ᵀ/S) / g` gives `W n(x) + b`.
        """
        weight = self._turned(rule.target, "weight")
        assert weight is not None
        if rule.norm not in self.biased:
            return weight
        weight = weight - weight.mean(1, keepdim=True)
        bias = self._turned(rule.target, "bias") if f"{rule.target}.bias" in self.moved else None
        return weight if bias is None else weight + bias[:, None] / weight.shape[1]

    def _turned(self, module: str, kind: str) -> torch.Tensor | None:
        """One RiGPT tensor in the stock frame, in float64; `None` for a bias that is absent."""
        name = self.named.get((module, kind))
        if name is None:
            return None
        tensor = self._with_wide_heads(name, self.state[name].to(torch.float64))
        tensor = tensor / self.constants.get(module, 1.0)
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
