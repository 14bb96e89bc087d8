"""Rotary positions: angles, their cosines and sines, and the rotation of queries and keys by them."""

import torch
from torch import nn
from transformers.modeling_rope_utils import dynamic_rope_update

from .configuration_rigpt import RiGPTConfig, default_rotary_frequencies, rotary_frequencies


class RiGPTRotaryEmbedding(nn.Module):
    """Angles of the position rotation `exp(p·A)`: cosines and sines `[B, S, r]` at the library's frequencies."""

    def __init__(self, config: RiGPTConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = rotary_frequencies(config)
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.to(device, copy=True), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: RiGPTConfig, *_, **__) -> tuple[torch.Tensor, float]:
        """The library asks its rotary modules for these."""
        return default_rotary_frequencies(config)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        return cos_sin(angles, self.attention_scaling, hidden_states.dtype)


def cos_sin(angles: torch.Tensor, scaling: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[..., r]` of angles `[..., r/2]`; dimension i turns together with i + r/2, as in Llama."""
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first r of the h dimensions of `[B, heads, S, h]` by angles broadcastable to `[B, heads, S, r]`."""
    rotated_dim = cos.shape[-1]
    turning, resting = states[..., :rotated_dim], states[..., rotated_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if resting.shape[-1] == 0 else torch.cat((turned, resting), dim=-1)
