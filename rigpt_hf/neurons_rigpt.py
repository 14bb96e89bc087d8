"""The value of a neuron from what it reads: `act(up)`, `act(gate) · up`, or the latter within bounds."""

import math
from collections.abc import Callable
from typing import Any

import torch


def bounds_of(config: Any) -> tuple[float, float] | None:
    """The bound `L` of what neurons read and their gain `α`, where a configuration has them."""
    return None if config.swiglu_limit is None else (config.swiglu_limit, config.swiglu_alpha)


def neurons_of(
    bounds: tuple[float, float] | None,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    up: torch.Tensor,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """
    The neurons `[..., F]` from what they read, `up` and `gate` `[..., F]`.

    With `bounds` `L` and `α`, `act(α g)/α · (u + 1)` where `g` is at most `L` and `u` between `-L` and `L`.
    """
    if gate is None:
        return act_fn(up)
    if bounds is None:
        return act_fn(gate) * up
    limit, alpha = bounds
    return act_fn(alpha * gate.clamp(max=limit)) / alpha * (up.clamp(-limit, limit) + 1)


def check_neurons(config: Any) -> None:
    """Raise a `ValueError` if the bounds of neurons are impossible, or do not fit the rest of a configuration."""
    if config.swiglu_limit is None:
        if config.swiglu_alpha != 1.0:
            raise ValueError(
                f"`swiglu_alpha` needs `swiglu_limit`, got {config.swiglu_alpha} without: weights can take up any "
                "factor where there is no bound. Set both, or leave it out."
            )
        return
    for name in ("swiglu_limit", "swiglu_alpha"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {getattr(config, name)}.")
    if not config.gated_mlp:
        raise ValueError(
            f"`swiglu_limit={config.swiglu_limit}` bounds gates and what they are multiplied with, and needs "
            "`gated_mlp=True`, got False. Set `gated_mlp`, or leave it out."
        )
