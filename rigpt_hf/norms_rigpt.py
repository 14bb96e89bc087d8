"""Norms of queries and keys, without a gain, with one, or with a metric in its place.

Shapes: B batch, S positions, h dims per head.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from .scores_rigpt import local


class RiGPTHeadNorm(nn.Module):
    """`n(x)` for heads of queries or keys `[B, heads, S, h]`."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def reset_own_parameters(self):
        """There are none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class RiGPTGainNorm(RiGPTHeadNorm):
    """`g n(x)`, with a gain per dimension that all heads share."""

    def __init__(self, size: int, eps: float):
        super().__init__(eps)
        self.weight = nn.Parameter(torch.ones(size))

    def reset_own_parameters(self):
        """No gain."""
        init.ones_(self.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gain = local(self.weight).to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, gain.shape, gain, self.eps)


class RiGPTMetricNorm(RiGPTHeadNorm):
    """
    `x / sqrt(|L x|²/h + eps)`: `n(x)` for the length that the metric `Lᵀ L` gives, in any frame of the head.

    `weight` `[heads·h, h]` has an `L` for each of them. With `L = diag(1/g)` and `g x` for `x` this is `g n(x)`.
    """

    def __init__(self, heads: int, size: int, eps: float):
        super().__init__(eps)
        self.weight = nn.Parameter(torch.eye(size).repeat(heads, 1))

    def reset_own_parameters(self):
        """The ordinary length."""
        size = self.weight.shape[1]
        init.copy_(self.weight, torch.eye(size).repeat(len(self.weight) // size, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        size = hidden_states.shape[-1]
        mapped = hidden_states @ local(self.weight).to(hidden_states.dtype).view(-1, size, size).mT  # [B, heads, S, h]
        accurate = torch.promote_types(hidden_states.dtype, torch.float32)
        square = mapped.to(accurate).square().mean(-1, keepdim=True)
        return (hidden_states.to(accurate) * torch.rsqrt(square + self.eps)).to(hidden_states.dtype)


def head_norm(config: Any, of: Literal["query", "key"]) -> RiGPTHeadNorm | None:
    """The norm of queries or keys, if they have one."""
    heads = config.num_attention_heads if of == "query" else config.num_key_value_heads
    match config.qk_norm_gain:
        case "vector":
            return RiGPTGainNorm(config.head_dim, config.rms_norm_eps)
        case "metric":
            return RiGPTMetricNorm(heads, config.head_dim, config.rms_norm_eps)
    return RiGPTHeadNorm(config.rms_norm_eps) if config.qk_norm else None
