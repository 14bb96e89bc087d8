"""
Second moments of what the matrices of a model read, each token weighted by what an error there does.

An error of a matrix that writes into the stream counts relative to the length of the stream: by `1/ms`, the mean
square of the stream it is added to. One of a query moves the output of that query, one of a key `s` or a value those
of all queries `t` that look at it:

    query, output     1 / ms_t of the stream after attention
    key               Σ_t A_ts (1 - A_ts) / ms_t,  over all heads and queries, A the probabilities
    value             Σ_t A_ts² / ms_t
    neurons           1 / ms_t of the next stream

Without weights a token on which attention rests while it has nothing to say, of a stream a thousand times as long as
the others, is all that the moments see. Behind a gain of `post_norm` an error is as large as the norm makes it.

Shapes: B windows, S tokens, d stream, n inputs of a matrix, E experts, F neurons of one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..frames import layer_of
from ..mlp_rigpt import RiGPTExperts
from ..modeling_rigpt import RiGPTForCausalLM
from .maps import Part, parts_of


Moments = dict[str, torch.Tensor]


@torch.no_grad()
def moments_by_layer(model: RiGPTForCausalLM, tokens: torch.Tensor, *, progress: bool = False) -> Iterator[Moments]:
    """
    The moments of what is in front of the layers, then of each layer, then of what is behind them.

    All windows go through one layer before any goes through the next; what is kept is their stream and the moments of
    one layer.

    Args:
        model: A RiGPT, which is left as it is.
        tokens (`torch.Tensor` of shape `[B, S]`): Token ids, windows of text.
        progress (`bool`): Show a progress bar.

    Returns:
        Dictionaries from the names of modules to `[n, n]`, in the dtype of the model or float32; matrices that read
        the same have the same tensor. `[E, F, F]` for what experts write with.

    Raises:
        ValueError: if depth is a flow, the tokens are none or not of this model, or a moment is not finite.
    """
    check_tokens(model, tokens)
    base, parts = model.model, parts_of(model)
    modules = dict(model.named_modules())
    ends = {name: modules[name] for name, part in parts.items() if part == "ends"}
    tokens = tokens.to(model.device)
    with _eager(model), tqdm(total=len(tokens) * (len(base.layers) + 1), disable=not progress, unit="window") as bar:
        bar.set_description("Calibrating")
        arguments = _arguments(model, tokens[:1])
        sums, stream = _Sums(), []
        with _Watched(ends) as watched:
            for row in tokens.split(1):
                position_ids = torch.arange(row.shape[1], device=row.device)[None]
                stream.append(base.first_hidden_states(base.embed_tokens(row), position_ids))
                for name in watched.inputs:
                    sums.add(name, watched.inputs[name], 1 / _mean_square(watched.outputs[name]))
                bar.update()
        yield sums.take()
        for index, layer in enumerate(base.layers):
            own = {name: part for name, part in parts.items() if layer_of(f"{name}.weight") == index}
            for place, row in enumerate(tokens.split(1)):
                given = arguments[index] | ({"input_ids": row} if "input_ids" in arguments[index] else {})
                stream[place] = _through(layer, stream[place], given, own, modules, sums)
                bar.update()
            yield sums.take()
        with _Watched(ends) as watched:
            for state in stream:
                state = state if base.transport is None else base.transport(state)
                state = base.norm(state)
                if base.project_out is not None:
                    base.project_out(state)
                for name in watched.inputs:
                    sums.add(name, watched.inputs[name], torch.ones_like(state[..., 0]))
        yield sums.take()


def all_moments(model: RiGPTForCausalLM, tokens: torch.Tensor, *, progress: bool = False) -> Moments:
    """[`moments_by_layer`] of the whole model at once, for models that are small enough."""
    return {name: part for parts in moments_by_layer(model, tokens, progress=progress) for name, part in parts.items()}


def check_tokens(model: RiGPTForCausalLM, tokens: torch.Tensor) -> None:
    """Raise a `ValueError` for a model or tokens that cannot be calibrated with."""
    if model.config.depth_solver is not None:
        raise ValueError(
            f"`depth_solver={model.config.depth_solver!r}` goes through each layer many times, and calibration once. "
            "Quantize with `method='round'` and no calibration."
        )
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.shape[1] < 2:
        raise ValueError(
            f"`calibration` must be windows [N, S] of at least two tokens, got the shape {list(tokens.shape)}. Give a "
            "longer text."
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise ValueError(
            f"`calibration` must hold tokens below {model.config.vocab_size}, got {int(tokens.max())}. Tokenize with "
            "the model's own tokenizer."
        )


class _Sums:
    """Moments that are being summed up; matrices with the same inputs and weights share theirs."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.same: dict[str, str] = {}

    def add(self, name: str, inputs: torch.Tensor, weights: torch.Tensor, blocks: int = 1) -> None:
        """Add the moments of inputs `[..., n]` with weights `[...]`."""
        x = inputs.flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * weights.flatten()[:, None].to(x).sqrt()
        if blocks > 1:
            x = x.unflatten(-1, (blocks, -1)).movedim(1, 0)  # [E, tokens, F]
        part = x.mT @ x
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def take(self) -> Moments:
        """The moments so far, by the names of modules, and a new beginning."""
        taken = self.sums | {name: self.sums[first] for name, first in self.same.items()}
        for name, moments in taken.items():
            if not bool(moments.isfinite().all()):
                raise ValueError(
                    f"`model` must give finite numbers on the calibration text, got NaN or infinity in front of "
                    f"{name}. Check its weights, or load it in float32."
                )
        self.sums, self.same = {}, {}
        return taken


def _through(
    layer: Any,
    state: torch.Tensor,
    arguments: dict[str, Any],
    parts: dict[str, Part],
    modules: dict[str, nn.Module],
    sums: _Sums,
) -> torch.Tensor:
    """One window through one layer: the stream behind it, and its moments added to the sums."""
    watch = {name: modules[name] for name in parts}
    around = {
        "attention": layer.self_attn,
        "after": layer.post_attention_layernorm,
        "attention norm": layer.attention_output_norm,
        "mlp norm": layer.mlp_output_norm,
    }
    experts = {name: module for name, module in modules.items() if isinstance(module, RiGPTExperts)}
    with _Watched({key: module for key, module in (watch | around).items() if module is not None}) as seen:
        state = layer(state, **arguments)
    after = seen.inputs.get("after", state)
    # An error in front of a norm is as large, relative to what the norm is given, as behind it.
    gains = {
        key: _mean_square(seen.outputs[key]) / _mean_square(seen.inputs[key]) if key in seen.inputs else 1.0
        for key in ("attention norm", "mlp norm")
    }
    by_query = gains["attention norm"] / _mean_square(after)  # [1, S]
    by_token = gains["mlp norm"] / _mean_square(state)
    probabilities = seen.outputs["attention"][1]  # [1, H, S, T]
    looked_at = torch.einsum("bhst,bs->bt", probabilities * (1 - probabilities), by_query.to(probabilities))
    weights: dict[str, torch.Tensor] = {
        "query": by_query,
        "output": by_query,
        "key": looked_at.clamp_min(0),
        "value": torch.einsum("bhst,bs->bt", probabilities.square(), by_query.to(probabilities)),
        "neurons": by_token,
        "experts": by_token,
    }
    first: dict[tuple[int, str], str] = {}
    for name, part in parts.items():
        inputs = seen.inputs[name]
        shared = (id(inputs), part)
        if shared in first:
            sums.same[name] = first[shared]
            continue
        first[shared] = name
        # Neurons of different experts are never added up for one error to make good another.
        owner = name.rpartition(".")[0]
        apart = part == "experts" and inputs.shape[-1] != state.shape[-1]
        blocks = experts[owner].num_experts if apart else 1
        sums.add(name, inputs, weights[part], blocks)
    return state


def _mean_square(states: torch.Tensor) -> torch.Tensor:
    """`ms` `[...]` of vectors `[..., d]`, kept away from zero."""
    return states.to(torch.promote_types(states.dtype, torch.float32)).square().mean(dim=-1).clamp_min(1e-12)


class _Watched:
    """Inside, what some modules read first and give is kept, the last of it."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, Any] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> "_Watched":
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_hook(self._keep(name)))
        return self

    def _keep(self, name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
            if arguments:
                self.inputs[name] = arguments[0]
            self.outputs[name] = output

        return hook

    def __exit__(self, *reason: object) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _eager(model: RiGPTForCausalLM) -> Iterator[None]:
    """Inside, attention is written out, so that its probabilities can be seen, and nothing is dropped."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def _arguments(model: RiGPTForCausalLM, row: torch.Tensor) -> list[dict[str, Any]]:
    """The keyword arguments that the model gives to each layer for a window of this length."""
    seen: list[dict[str, Any]] = []

    def keep(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
    try:
        model.model.residual_stream(input_ids=row, use_cache=False, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    return seen
