"""
Positions as linear biases of scores: `q·k / sqrt(h) - slope · distance`, ALiBi (arXiv 2108.12409).

Shapes: B batch, S new positions, T positions including the cache, H query heads.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .scores_rigpt import local


def alibi_slopes(heads: int) -> list[float]:
    """
    The paper's slopes for `heads` heads: `2^(-8i/P)` for `i` from 1 to `P`, the largest power of two among numbers up
    to `heads`; beyond `P` every other one of those for `2P` heads.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)] + [4 * i / power for i in range(1, 2 * power, 2)]
    return [2.0**-exponent for exponent in exponents[:heads]]


class RiGPTAlibi(nn.Module):
    """
    Takes `slope · distance` from scores. The slopes `[H]` belong to the heads and are not learned.

    A distance is the number of keys that a query sees behind this one, its own among them: with a cache, padding and
    packed sequences that is the difference of positions. Counted from the beginning, as the softmax would allow, it
    would be a large number, and be rounded like one.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(alibi_slopes(heads)), requires_grad=False)

    def reset_own_parameters(self):
        """The slopes of the paper."""
        init.copy_(self.weight, torch.tensor(alibi_slopes(len(self.weight))))

    def forward(self, attention_mask: Any, query: torch.Tensor, key: torch.Tensor) -> Any:
        """
        The mask to add to scores, `[B or 1, H, S, T]` in the dtype of the query.

        Args:
            attention_mask (`torch.Tensor` of shape `[B or 1, 1, S, T]`, *optional*):
                Of booleans, or to add to scores; `None`: a query sees all before it. The mask of FlexAttention, whose
                modification of scores reads the slopes itself, is left as it is.
            query (`torch.Tensor` of shape `[B, H, S, h]`), key (`torch.Tensor` of shape `[B, K, T, h]`).
        """
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            return attention_mask
        new, length = query.shape[2], key.shape[2]
        if attention_mask is None:
            columns = torch.arange(length, device=query.device)
            # The library leaves out the mask of a single query, and that of the first ones, also of those that go into
            # a cache of fixed size.
            own = columns[-1:] if new == 1 else columns[:new]
            seen = (columns <= own[:, None])[None, None]
        elif attention_mask.dtype is torch.bool:
            seen = attention_mask
        else:
            seen = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        distance = seen.sum(-1, keepdim=True) - seen.cumsum(-1)  # [B or 1, 1, S, T]
        slopes = local(self.weight)[:, None, None]
        bias = -slopes.to(torch.promote_types(slopes.dtype, torch.float32)) * distance
        if attention_mask is not None and attention_mask.dtype is not torch.bool:
            bias = bias + attention_mask
        return torch.where(seen, bias.to(query.dtype), torch.finfo(query.dtype).min)

    def extra_repr(self) -> str:
        return f"heads={len(self.weight)}"
