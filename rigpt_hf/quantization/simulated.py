"""
Activations and caches of few bits, simulated: rounded to a grid and computed with in full precision.

No kernel here computes with them. Activations have a scale and an offset per token, keys and values per token and
head, chosen when the numbers come.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..decoder_rigpt import RiGPTAttention
from ..frames import layer_of
from ..modeling_rigpt import RiGPTForCausalLM
from ..packed_rigpt import QuantizedLinear
from ..scores_rigpt import Score
from .hadamard import hadamard, known_hadamard


# How far a grid of few bits goes, of what the numbers of a token span.
REACH, REACH_OF_CACHE = {4: 0.9, 3: 0.85}, {4: 0.95, 3: 0.9}


def rounded_tokens(states: torch.Tensor, bits: int, reach: Mapping[int, float] = REACH) -> torch.Tensor:
    """Vectors `[..., n]` on a grid of `2**bits` numbers, with a scale and an offset each."""
    work = states.to(torch.promote_types(states.dtype, torch.float32))
    low, high = work.aminmax(dim=-1, keepdim=True)
    last = 2**bits - 1
    scale = (high - low) * (reach.get(bits, 1.0) / last)
    start = (low + high) / 2 - scale * (last / 2)
    codes = ((work - start) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, last)
    rounded = (start + codes * scale).to(states.dtype)
    # Rounding has no derivative: whoever trains through it sees the identity (Bengio et al., arXiv 1308.3432).
    return states + (rounded - states).detach() if states.requires_grad else rounded


def round_inputs_(
    model: nn.Module,
    names: list[str],
    bits: int | None,
    gains: Mapping[str, torch.Tensor],
    turns: Mapping[str, torch.Tensor],
) -> None:
    """
    Let some linear maps of a model turn and round what they read, in place.

    Args:
        model, names: The model, and the modules that do.
        bits (`int`, *optional*): Of activations; `None` leaves them whole.
        gains: Factors `[n]` of inputs by modules that have some, which their weights have too: they come first.
        turns: Orthogonal `[n, n]` by modules whose weights read what they turn.
    """
    modules = dict(model.named_modules())
    for name in names:
        if bits is not None or name in turns:
            modules[name].register_forward_pre_hook(_reading(bits, gains.get(name), turns.get(name)))


def online_turn(name: str, width: int, seed: int) -> torch.Tensor:
    """The Hadamard matrix `[width, width]` that turns what a module reads, with signs that follow from its name."""
    return hadamard(width, torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode())))


def simulate(model: RiGPTForCausalLM, config: Any) -> None:
    """Let a loaded model of codes round what its `RiGPTQuantizationConfig` says that they were made for, in place."""
    recipe = config.recipe or {}
    codes = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    codes.pop("lm_head", None)
    if (bits := config.activation_bits) is not None:
        inner = [name for name in codes if layer_of(f"{name}.weight") is not None]
        turned, seed = recipe.get("turned", []), recipe.get("seed", 0)
        turns = {name: online_turn(name, codes[name].in_features, seed) for name in turned}
        gains = {name: module.gain for name, module in codes.items() if module.gain is not None}
        round_inputs_(model, inner, bits, gains, turns)
    if config.cache_bits is not None:
        round_cache_(model, config.cache_bits, recipe.get("frame") == "hadamard")


def _reading(bits: int | None, gain: torch.Tensor | None, turn: torch.Tensor | None) -> Callable:
    def hook(module: nn.Module, arguments: tuple) -> tuple:
        states = arguments[0]
        if turn is not None:
            states = states @ turn.to(states).T
        if bits is not None:
            own = None if gain is None else gain.to(states)
            states = rounded_tokens(states if own is None else states * own, bits)
            states = states if own is None else states / own
        return (states, *arguments[1:])

    return hook


@dataclass(frozen=True)
class RoundedCache(Score):
    """
    A score that sees keys and values as a cache of few bits would give them back.

    Args:
        bits: Of their numbers.
        turned: Keys, and the queries they meet, are turned by a Hadamard matrix before they are rounded.
    """

    bits: int = 4
    turned: bool = True

    def prepare(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of [`Score`], with rounded keys and values."""
        turn = known_hadamard(key.shape[-1]) if self.turned else None
        if turn is None:
            key = rounded_tokens(key, self.bits, REACH_OF_CACHE)
        else:
            turn = turn.to(key)
            key = rounded_tokens(key @ turn.T, self.bits, REACH_OF_CACHE) @ turn
        return super().prepare(query, key, rounded_tokens(value, self.bits, REACH_OF_CACHE), *arguments)


def round_cache_(model: RiGPTForCausalLM, bits: int, turned: bool = True) -> None:
    """Let all layers see keys and values of few bits, in place."""
    for module in model.modules():
        if isinstance(module, RiGPTAttention):
            own = {field.name: getattr(module.score, field.name) for field in fields(Score)}
            module.score = RoundedCache(**own, bits=bits, turned=turned)
