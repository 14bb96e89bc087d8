"""Mixing the vector of the previous token into that of each token, with a scalar gate: no coordinate is special."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_rigpt import RiGPTConfig


class RiGPTPreviousToken(nn.Module):
    """
    `x[t] + λ sigmoid(w·x[t]) x[t-1]`, with `w` a covector of the stream and `λ` a number, at first 0.

    What comes before the first token of a text is zero; and a cache keeps the last vector, as the library's caches do
    for convolutions of width two.
    """

    def __init__(self, config: RiGPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.gate.starts_at_zero = True
        self.weight = nn.Parameter(torch.zeros(1))

    def reset_own_parameters(self):
        """`λ = 0`, where nothing is mixed."""
        init.zeros_(self.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[B, S, d]`): vectors of the tokens.
            position_ids (`torch.LongTensor` of shape `[B or 1, S]`): 0 where a text begins.
            attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): 0 for padding, which is nobody's previous.
            past_key_values (`Cache`, *optional*): made from the model's config.
        """
        size = hidden_states.shape[1]
        vectors = hidden_states.transpose(1, 2)  # [B, d, S]
        if past_key_values is not None:
            vectors = remembered(past_key_values, vectors)
        # One zero column in front, in case nothing is remembered; of all columns, those one before each token's own.
        previous = nn.functional.pad(vectors, (1, 0))[..., :-1][..., -size:].transpose(1, 2)
        begins = (position_ids == 0).expand(len(hidden_states), -1)
        if attention_mask is not None and attention_mask.dim() == 2:
            begins = begins | (nn.functional.pad(attention_mask, (1, 0))[:, :-1][:, -size:] == 0)
        previous = previous.masked_fill(begins[..., None], 0.0)
        return hidden_states + self.weight * torch.sigmoid(self.gate(hidden_states)) * previous


def remembered(cache: Cache, vectors: torch.Tensor) -> torch.Tensor:
    """
    `[B, d, n + S]`: what the cache kept of earlier calls, and `vectors` `[B, d, S]`, of which it keeps the last.

    Raises:
        ValueError: if the cache has no room for it.
    """
    if not cache.layers or not hasattr(cache.layers[0], "update_conv_state"):
        raise ValueError(
            "`past_key_values` must be made from the model's config to remember the previous token, as "
            f"`DynamicCache(config=model.config)` is, got a {type(cache).__name__} without room for it. Make it so, "
            "or leave it out."
        )
    return cache.update_conv_state(vectors, 0, conv_kernel_size=1)


__all__ = ["RiGPTPreviousToken"]
