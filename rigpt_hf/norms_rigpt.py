"""Norms of queries and keys, without a gain, with one, or with a metric in its place.

Shapes: B batch, S positions, h dims per head.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from .scores_rigpt import local


class RiGPTHeadNorm(nn.Module):
    """`n(x)` for heads of queries or keys `[B, heads, S, h]`; `together`: by the length of all heads together."""

    def __init__(self, eps: float, together: bool = False):
        super().__init__()
        self.eps, self.together = eps, together

    def reset_own_parameters(self):
        """There are none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.normalised(hidden_states)

    def normalised(self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """`g n(x)`."""
        if not self.together:
            return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], gain, self.eps)
        heads = hidden_states.transpose(1, 2)  # as the map in front gave them
        flat = heads.flatten(2)
        return nn.functional.rms_norm(flat, flat.shape[-1:], gain, self.eps).view(heads.shape).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, together={self.together}"


class RiGPTGainNorm(RiGPTHeadNorm):
    """`g n(x)`, with a gain per dimension, of a head that shares them with all others, or of all heads together."""

    def __init__(self, size: int, eps: float, together: bool = False):
        super().__init__(eps, together)
        self.weight = nn.Parameter(torch.ones(size))

    def reset_own_parameters(self):
        """No gain."""
        init.ones_(self.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.normalised(hidden_states, local(self.weight).to(hidden_states.dtype))


class RiGPTMetricNorm(RiGPTHeadNorm):
    """
    `x / sqrt(|L x|²/h + eps)`: `n(x)` for the length that the metric `Lᵀ L` gives, in any frame of the head.

    `weight` `[heads·h, h]` has an `L` for each of them. With `L = diag(1/g)` and `g x` for `x` this is `g n(x)`.
    """

    def __init__(self, heads: int, size: int, eps: float, together: bool = False):
        super().__init__(eps, together)
        self.weight = nn.Parameter(torch.eye(size).repeat(heads, 1))

    def reset_own_parameters(self):
        """The ordinary length."""
        size = self.weight.shape[1]
        init.copy_(self.weight, torch.eye(size).repeat(len(self.weight) // size, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        size = hidden_states.shape[-1]
        mapped = hidden_states @ local(self.weight).to(hidden_states.dtype).view(-1, size, size).mT  # [B, heads, S, h]
        accurate = torch.promote_types(hidden_states.dtype, torch.float32)
        square = mapped.to(accurate).square().mean((1, 3) if self.together else -1, keepdim=True)
        return (hidden_states.to(accurate) * torch.rsqrt(square + self.eps)).to(hidden_states.dtype)


def head_norm(config: Any, of: Literal["query", "key"]) -> RiGPTHeadNorm | None:
    """The norm of queries or keys, if they have one."""
    heads = config.num_attention_heads if of == "query" else config.num_key_value_heads
    how = config.rms_norm_eps, config.qk_norm_over == "all"
    match config.qk_norm_gain:
        case "vector":
            return RiGPTGainNorm(config.head_dim * (heads if config.qk_norm_over == "all" else 1), *how)
        case "metric":
            return RiGPTMetricNorm(heads, config.head_dim, *how)
    return RiGPTHeadNorm(*how) if config.qk_norm else None
