"""A layer: norms of the stream, attention and neurons, and the two lines by which it changes the stream."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .alibi_rigpt import RiGPTAlibi
from .configuration_rigpt import RiGPTConfig, rotary_frequencies
from .flow_rigpt import flow_through
from .kernels_rigpt import linear
from .layers_rigpt import is_turned, of_layer, window_of
from .mlp_rigpt import mlp_of
from .norms_rigpt import RiGPTGainNorm, head_norm, unit
from .rope_rigpt import cos_sin, rotate
from .scores_rigpt import SCORES, eager_attention_forward, local, repeat_heads


class RiGPTRMSNorm(nn.Module):
    """`n(x) = x / sqrt(mean(x²) + eps)`: RMSNorm without the gain, hence without a basis."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return unit(hidden_states, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class RiGPTVectorDropout(nn.Module):
    """Drops whole vectors: one coin per token, where coordinate dropout would toss one per axis."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return hidden_states
        return hidden_states * nn.functional.dropout(hidden_states.new_ones(*hidden_states.shape[:-1], 1), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class RiGPTTransport(nn.Module):
    """
    `x -> T x` from one frame of the stream to another; at first the same frame.

    An orthogonal `T` is a choice of frames and nothing to be learned, so it is frozen; and it is no `nn.Linear`, which
    adapters and quantizers look for.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight)

    def extra_repr(self) -> str:
        return f"size={self.weight.shape[0]}"


def has_value_embedding(config: RiGPTConfig, layer_idx: int) -> bool:
    """
    Whether a layer adds vectors of the tokens to its values: every so many, counted back from the last, but not the
    first, which sees nothing but tokens anyway.
    """
    period = config.value_embedding_period
    return period is not None and layer_idx > 0 and (config.num_hidden_layers - 1 - layer_idx) % period == 0


class RiGPTAttention(nn.Module):
    """Grouped-query attention whose score depends on (query, key) only through invariants of the head space."""

    def __init__(self, config: RiGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.score = SCORES[config.attention_score]
        self.demands = self.score.demands(config)
        self.is_causal = True
        self.sliding_window = window_of(config, layer_idx)
        self.is_turned = is_turned(config, layer_idx)

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm, self.k_norm = head_norm(config, "query"), head_norm(config, "key")
        self.value_embedding: nn.Embedding | None = None
        self.value_gate: nn.Linear | None = None
        if has_value_embedding(config, layer_idx):
            self.value_embedding = nn.Embedding(config.vocab_size, key_value_size)
            self.value_gate = nn.Linear(config.hidden_size, config.num_key_value_heads, bias=False)
            # Neutral: zero vectors behind gates of one.
            self.value_embedding.starts_at_zero = self.value_gate.starts_at_zero = True
        self.distance_weight: nn.Parameter | None = None
        if self.score.weighted:
            self.distance_weight = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.alibi = RiGPTAlibi(config.num_attention_heads) if config.position_embedding_type == "alibi" else None
        self.has_sinks = config.attention_sinks
        if self.has_sinks:  # nothing of this name otherwise: the library looks for it
            self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.rotary_frequencies: nn.Parameter | None = None
        if config.rotary_learned_frequencies and self.is_turned:
            frequencies, self.rotary_scaling = rotary_frequencies(of_layer(config, layer_idx))
            # At least in single precision whatever the model is in: a position multiplies their rounding error.
            accurate = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.rotary_frequencies = nn.Parameter(frequencies.to(accurate).repeat(config.num_key_value_heads, 1))

    def reset_own_parameters(self):
        """λ = 0, where every score is the dot product, sinks of 0, and the frequencies of the configured rope type."""
        if self.distance_weight is not None:
            init.zeros_(self.distance_weight)
        if self.has_sinks:
            init.zeros_(self.sinks)
        if self.rotary_frequencies is not None:
            frequencies, _ = rotary_frequencies(of_layer(self.config, self.layer_idx))
            init.copy_(self.rotary_frequencies, frequencies.expand_as(self.rotary_frequencies))

    def learned_rotation(
        self, position_ids: torch.LongTensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[B, K, S, r]` of this layer's own frequencies, which learn through them."""
        frequencies = local(self.rotary_frequencies)[:, None, :]
        accurate = torch.promote_types(frequencies.dtype, torch.float32)
        angles = position_ids[:, None, :, None].to(accurate) * frequencies.to(accurate)
        return cos_sin(angles, self.rotary_scaling, dtype)

    def gated_value_embedding(self, hidden_states: torch.Tensor, input_ids: torch.LongTensor) -> torch.Tensor:
        """The share of the tokens in the values, `[B, S, K·h]`; a gate between 0 and 2 per head, first 1."""
        assert self.value_embedding is not None and self.value_gate is not None
        table = self.value_embedding
        # By hand where tensor parallelism shards it: a lookup of its own would gather the vectors of all heads.
        by_hand = hasattr(table.weight, "to_local")
        vectors = nn.functional.embedding(input_ids, local(table.weight)) if by_hand else table(input_ids)
        gate = 2 * torch.sigmoid(linear(self.value_gate, hidden_states))  # [B, S, K]
        return (vectors.unflatten(-1, (-1, self.head_dim)) * gate[..., None]).flatten(-2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        input_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = linear(self.q_proj, hidden_states).view(head_shape).transpose(1, 2)  # [B, H, S, h]
        key = linear(self.k_proj, hidden_states).view(head_shape).transpose(1, 2)  # [B, K, S, h]
        value = linear(self.v_proj, hidden_states)
        if self.value_embedding is not None:
            value = value + self.gated_value_embedding(hidden_states, input_ids)
        value = value.view(head_shape).transpose(1, 2)

        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary_frequencies is not None:
            cos, sin = self.learned_rotation(position_ids, query.dtype)
            query_cos, query_sin = (repeat_heads(x, self.num_key_value_groups) for x in (cos, sin))
            query, key = rotate(query, query_cos, query_sin), rotate(key, cos, sin)
        elif self.is_turned and position_embeddings is not None:
            cos, sin = (x[:, None] for x in position_embeddings)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        # The score's own coordinates come after the cache, which keeps plain keys.
        query, key, value = self.score.prepare(
            query, key, value, self.distance_weight, self.layer_idx, self.demands, kwargs
        )
        if self.alibi is not None:
            attention_mask = self.alibi(attention_mask, query, key)
        backend, attention = self.score.backend(self.config._attn_implementation, self.demands)
        if self.has_sinks:
            kwargs["s_aux"] = local(self.sinks)
        if attention is None:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        output, probabilities = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.config.attn_logit_softcapping,
            **kwargs,
        )
        output = output[..., : self.head_dim].reshape(*input_shape, -1)
        return linear(self.o_proj, output), probabilities


class RiGPTDecoderLayer(GradientCheckpointingLayer):
    """Two residual lines around parameter-free norms; with `depth_solver` the flow that they are an Euler step of."""

    def __init__(self, config: RiGPTConfig, layer_idx: int):
        super().__init__()
        self.transport = RiGPTTransport(config.hidden_size) if config.local_frames else None
        self.self_attn = RiGPTAttention(config, layer_idx)
        self.input_layernorm: nn.Module = RiGPTRMSNorm(config.rms_norm_eps)
        self.post_attention_layernorm: nn.Module | None = RiGPTRMSNorm(config.rms_norm_eps)
        if not config.pre_norm:
            self.input_layernorm = self.post_attention_layernorm = nn.Identity()
        if config.use_parallel_residual:  # side by side, attention and MLP read one normalised stream
            self.post_attention_layernorm = None
        self.mlp = mlp_of(config, layer_idx)
        self.attention_output_norm: RiGPTGainNorm | None = None
        self.mlp_output_norm: RiGPTGainNorm | None = None
        if config.post_norm:
            sizes = config.hidden_size, config.rms_norm_eps
            self.attention_output_norm, self.mlp_output_norm = RiGPTGainNorm(*sizes), RiGPTGainNorm(*sizes)
        self.dropout = RiGPTVectorDropout(config.residual_dropout)
        for name, module in self.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.writes_to_residual = True

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """The stream `[B, S, d]` at the next layer, from the stream at this one."""
        if self.transport is not None:
            hidden_states = self.transport(hidden_states)
        if self.self_attn.config.depth_solver is not None:
            return flow_through(self, hidden_states, **kwargs)
        return self.block(hidden_states, **kwargs)

    def block(
        self, hidden_states: torch.Tensor, carry: Any = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """The two lines, one after the other or both at once."""
        normalised = self.input_layernorm(hidden_states)
        attention_output, _ = self.self_attn(normalised, **kwargs)
        if self.attention_output_norm is not None:
            attention_output = carry(self.attention_output_norm(attention_output))
        hidden_states = hidden_states + self.dropout(attention_output)
        if self.post_attention_layernorm is not None:
            normalised = self.post_attention_layernorm(hidden_states)
        mlp_output = self.mlp(normalised)
        if self.mlp_output_norm is not None:
            mlp_output = carry(self.mlp_output_norm(mlp_output))
        return hidden_states + self.dropout(mlp_output)
