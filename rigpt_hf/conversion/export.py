"""`export_model`: a RiGPT becomes an unmodified stock model, through the same weight maps read backwards.

Shapes: V vocabulary, D lexical, d stream of the RiGPT, S stream of the stock model, n other sizes. The stock stream is
reached by `x_stock = Qᵀ x` with Q `[d, S]`, an isometry on everything that is ever written into the stream. Then
readers turn into `W Q`, writers into `Qᵀ W`, positions into `P Q`, and the stock gains are 1 inside the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM

from ..checkpoints.read import name_some
from ..checkpoints.write import Entry
from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.local_frames import to_global_frame
from . import gpt2, llama
from .assemble import assemble
from .frames import StockFrame, choose_frame
from .maps import Family, Role, Rule
from .neutral import refuse_options


TARGETS = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}


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
    plan = plan_export(model, target, frame)
    dtype = dtype or model.dtype
    tensors = {entry.name: entry.make(dtype) for entry in plan.entries}
    return assemble(plan.model_class, plan.config, tensors, dtype, model, _stock_backend(model))


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
    config: RiGPTConfig = model.config
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    idle = refuse_options(config, state)
    family = gpt2.GPT2 if target == "gpt2" else llama.LLAMA
    make_config = {
        "gpt2": gpt2.stock_config,
        "llama": llama.stock_config,
        "qwen2": lambda config: llama.stock_config(config, qwen2=True),
    }[target]
    stock_config = make_config(config)  # refuses options before any algebra
    stock_frame = choose_frame(config, state, family, frame)
    stock_config.tie_word_embeddings = stock_frame.head is None
    with torch.device("meta"):
        skeleton = TARGETS[target](stock_config)
    used = {name: tensor for name, tensor in state.items() if name not in idle}
    return ExportPlan(TARGETS[target], stock_config, _unfold(family, stock_frame, used, skeleton))


def _stock_backend(model: RiGPTForCausalLM) -> str:
    backend = model.config._attn_implementation
    return backend if backend in ("eager", "sdpa", "flash_attention_2", "flex_attention") else "sdpa"


def _unfold(family: Family, frame: StockFrame, state: dict[str, torch.Tensor], skeleton: Any) -> tuple[Entry, ...]:
    """The recipes of the stock model's tensors; every one of them, from every one of the RiGPT's."""
    tied = frame.head is None
    by_source: dict[str, list[Rule]] = {}
    norms: set[str] = set()
    used = set(_PLACED_BY_FRAME)
    for rule, _ in family.expand(skeleton.config.num_hidden_layers, tied):
        if rule.source is not None:
            by_source.setdefault(rule.source, []).append(rule)
        if rule.norm is not None:
            norms.add(rule.norm)
    norms.add(family.final_norm)
    entries = []
    for name, example in skeleton.state_dict().items():
        module, _, kind = name.rpartition(".")
        recipe: Callable[[], torch.Tensor]
        if tied and module == family.head:
            continue
        if module == family.embedding:
            recipe = partial(_given, frame.embedding)
        elif module == family.head:
            recipe = partial(_given, frame.head)
        elif module == family.final_norm:
            recipe = partial(_given, frame.gain if kind == "weight" else frame.bias)
        elif module in norms:
            recipe = partial(torch.full, example.shape, 1.0 if kind == "weight" else 0.0)
        elif module in by_source:
            rules = sorted(by_source[module], key=lambda rule: rule.part)
            used.update(f"{rule.target}.{kind}" for rule in rules)
            transposed = kind == "weight" and family.is_transposed(module)
            recipe = partial(_joined, rules, kind, frame, state, example.shape[0] // len(rules), transposed)
        else:
            raise ValueError(f"`{name}` of the target has no rule in the weight map of {family.name}.")
        entries.append(Entry(name, tuple(example.shape), partial(_made, name, tuple(example.shape), recipe)))
    if unused := set(state) - used:
        raise ValueError(f"{name_some(unused)} of the source has no place in {family.name}.")
    return tuple(entries)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _joined(
    rules: list[Rule], kind: str, frame: StockFrame, state: dict[str, torch.Tensor], size: int, transposed: bool
) -> torch.Tensor:
    """A stock module's weight or bias from the RiGPT's modules; zeros of `size` for a bias that is absent."""
    parts = [_turn_back(rule, kind, frame, state) for rule in rules]
    tensor = torch.cat([torch.zeros(size) if part is None else part for part in parts])
    return tensor.T if transposed else tensor


def _made(name: str, shape: tuple[int, ...], recipe: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    tensor = recipe()
    if tensor.shape != shape:
        raise ValueError(
            f"`{name}` of the target must have shape {list(shape)}, the source gives {list(tensor.shape)}."
        )
    return tensor.to(dtype).contiguous().clone()


# What `choose_frame` consumes: the tables of tokens and the two projections.
_PLACED_BY_FRAME = {
    "model.embed_tokens.weight",
    "model.project_in.weight",
    "model.project_out.weight",
    "model.project_out.bias",
    "lm_head.weight",
}


def _turn_back(rule: Rule, kind: str, frame: StockFrame, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """One RiGPT tensor in the stock frame, in float64; `None` for a bias that is absent."""
    name = f"{rule.target}.{kind}"
    if name not in state:
        return None
    tensor = state[name].to(torch.float64)
    match rule.role:
        case Role.READER if kind == "weight":
            return frame.read(tensor)
        case Role.POSITIONS:
            return frame.read(tensor)
        case Role.WRITER:
            return frame.write(tensor)
    return tensor
