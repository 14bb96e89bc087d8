"""Attention of RiGPT: positions as rotations, scores that depend on invariants of (query, key), and the layer itself.

Shapes: B batch, S new positions, T positions including the cache, H query heads, K key-value heads, h dims per head,
r <= h rotated dims, d stream.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_rigpt import RiGPTConfig


# Attention kernels want head sizes that are multiples of this.
KERNEL_ALIGNMENT = 8
# Up to so many rows `W xᵀ` beats `x Wᵀ` on CPUs.
FEW_ROWS = 4


class RiGPTLinear(nn.Linear):
    """
    `nn.Linear` that is quick on few rows on a CPU, as in cached generation.

    There BLAS computes `x Wᵀ` at a fraction of the memory bandwidth, but `W xᵀ` of two to four columns at nearly all
    of it. Same product, other order of operands; `make bench` shows what it brings.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.numel() // self.in_features
        if not 0 < rows <= FEW_ROWS or not self._plain_inference_on_cpu(hidden_states):
            return nn.functional.linear(hidden_states, self.weight, self.bias)
        columns = hidden_states.reshape(rows, self.in_features)
        if rows == 1:  # a single column would be a matrix-vector product again
            output = (self.weight @ torch.cat((columns, columns)).t())[:, 0].contiguous()
        else:
            output = (self.weight @ columns.t()).t().contiguous()
        if self.bias is not None:
            output += self.bias
        return output.view(*hidden_states.shape[:-1], self.out_features)

    def _plain_inference_on_cpu(self, hidden_states: torch.Tensor) -> bool:
        return (
            hidden_states.device.type == "cpu"
            and hidden_states.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.compiler.is_exporting()  # which may want to leave the number of rows open
            and type(self.weight) is nn.Parameter  # no quantised or sharded subclass, which knows better
        )


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
        """Frequencies `theta^(-2i/r)` of RoPE (arXiv 2104.09864) and the scaling 1 of its cosines and sines."""
        dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        return cos_sin(angles, self.attention_scaling, hidden_states.dtype)


def rotary_frequencies(config: RiGPTConfig) -> tuple[torch.Tensor, float]:
    """Frequencies `[r/2]` in radians per position and the scaling of cosines and sines, for any rope type."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return RiGPTRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope_type](config)


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


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, K, T, h]` to `[B, K·groups, T, h]`, every key-value head repeated for its query heads."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def squared_distance_as_dot(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Write `q·k - λ|k|²/2` as an ordinary dot product in a few more dimensions: `q' = [q, λ, λ]`, `k' = [k, n, m]`.

    `n + m = -|k|²/2`; `m` holds what rounding `n` to the dtype left over, which matters in 16 bits. Everything is
    zero-padded to the alignment of the kernels, and values to the same size, as most kernels want one head size.

    Args:
        query (`torch.Tensor` of shape `[B, H, S, h]`), key, value (`torch.Tensor` of shape `[B, K, T, h]`)
        weight (`torch.Tensor` of shape `[H]`): λ per query head.

    Returns:
        query, key and value with head size `h'`, the next multiple of the alignment above `h + 1`.
    """
    half_norm = -0.5 * key.to(torch.promote_types(key.dtype, torch.float32)).square().sum(-1, keepdim=True)
    rounded = half_norm.to(key.dtype)
    remainder = (half_norm - rounded).to(key.dtype)
    weight = weight.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = torch.cat((query, weight, weight), dim=-1)
    key = torch.cat((key, rounded, remainder), dim=-1)
    size = -(-key.shape[-1] // KERNEL_ALIGNMENT) * KERNEL_ALIGNMENT
    return tuple(nn.functional.pad(states, (0, size - states.shape[-1])) for states in (query, key, value))


def distance_score(
    dot: torch.Tensor, query_norm: torch.Tensor, key_norm: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """
    `(1-λ) q·k - λ|q-k|` from the invariants `q·k`, `|q|²`, `|k|²`; all arguments broadcast together.

    The distance is kept away from zero, where its gradient has no limit, by the smallest square that `|q|² + |k|² -
    2 q·k` can resolve.
    """
    squared_distance = (query_norm + key_norm - 2 * dot).clamp_min(torch.finfo(dot.dtype).eps)
    return (1 - weight) * dot - weight * squared_distance.sqrt()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for any score. Returns `[B, S, H, h]` and the probabilities `[B, H, S, T]`."""
    key, value = (repeat_heads(states, module.num_key_value_groups) for states in (key, value))
    scores = query @ key.transpose(2, 3)
    if module.attention_score == "distance":
        scores = distance_score(
            scores.to(torch.promote_types(scores.dtype, torch.float32)),
            squared_norm(query)[..., :, None],
            squared_norm(key)[..., None, :],
            local(module.distance_weight)[:, None, None],
        )
    scores = scores * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    accurate = torch.promote_types(query.dtype, torch.float32)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=accurate).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def squared_norm(states: torch.Tensor) -> torch.Tensor:
    """`|x|²` over the last dimension, summed in at least single precision."""
    return states.to(torch.promote_types(states.dtype, torch.float32)).square().sum(-1)


def distance_flex_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention by distance as a score modification of FlexAttention. Returns `[B, S, H, h]` and no probabilities."""
    if dropout > 0:
        raise ValueError(
            f"`attention_dropout` must be 0 to train with 'flex_attention', got {dropout}. Set it to 0 or load with "
            "attn_implementation='eager'."
        )
    groups = module.num_key_value_groups
    query_norm, key_norm, weight = squared_norm(query), squared_norm(key), local(module.distance_weight).float()

    def score_mod(dot, batch, head, query_index, key_index):
        norms = query_norm[batch, head, query_index], key_norm[batch, head // groups, key_index]
        return distance_score(dot, *norms, weight[head]) * scaling

    output = compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        score_mod=score_mod,
        block_mask=attention_mask,
        enable_gqa=groups > 1,
        scale=1.0,
        kernel_options=kwargs.get("kernel_options"),
    )
    return output.transpose(1, 2).contiguous(), None


# Plain distance is no dot product in any number of dimensions, so it needs a backend that can modify scores.
DISTANCE_BACKENDS: dict[str, Callable] = {
    "eager": eager_attention_forward,
    "flex_attention": distance_flex_attention_forward,
}


def check_distance_backend(name: str):
    """Raises a `ValueError` if the backend of this name cannot express `attention_score='distance'`."""
    if name not in DISTANCE_BACKENDS:
        raise ValueError(
            f"`attn_implementation` must be one of {', '.join(DISTANCE_BACKENDS)} for `attention_score='distance'`, "
            f"which is no dot product, got {name!r}. Name one of these, or none."
        )


def check_paged_cache(config: RiGPTConfig, name: str):
    """Raises a `ValueError` if continuous batching cannot hand over its cache before the score."""
    score = config.attention_score
    if score != "dot" and "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        raise ValueError(
            f"`attn_implementation` must not be paged for `attention_score={score!r}` in this version of "
            f"Transformers, got {name!r}. Update Transformers, or generate without continuous batching."
        )


def packed_lengths(position_ids: torch.LongTensor, batch_size: int) -> dict[str, Any]:
    """
    Where packed sequences begin, for flash attention, which is given no mask and would let them see each other.

    Args:
        position_ids: `[B or 1, S]`; a sequence begins where they do not go up by one.
        batch_size: B.

    Returns:
        The arguments of the library for sequences of different lengths, with `N + 1` offsets into all `B·S` positions;
        nothing if every row is one sequence.
    """
    goes_on = position_ids.diff(dim=-1) == 1
    if bool(goes_on.all()):
        return {}
    begins = ~nn.functional.pad(goes_on, (1, 0)).expand(batch_size, -1).flatten()
    offsets = nn.functional.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)
    longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}


def update_paged_cache(
    cache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store new keys and values in the cache of continuous batching; returns all of them, `[1, K, T, h]`."""
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "`max_blocks_per_request` of the continuous batching config must be 0 for an `attention_score` other than "
            "'dot', whose keys no kernel may fetch by itself. Set it to 0 or use attn_implementation='sdpa'."
        )
    return cache.update(key_states=key, value_states=value, layer_idx=layer_idx, kwargs=kwargs)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's shard of a parameter that tensor parallelism splits by heads; otherwise the parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


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
        self.attention_score = config.attention_score
        self.qk_norm_eps = config.rms_norm_eps if config.qk_norm else None
        self.is_causal = True

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = RiGPTLinear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = RiGPTLinear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = RiGPTLinear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = RiGPTLinear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.value_embedding: nn.Embedding | None = None
        self.value_gate: RiGPTLinear | None = None
        if has_value_embedding(config, layer_idx):
            self.value_embedding = nn.Embedding(config.vocab_size, key_value_size)
            self.value_gate = RiGPTLinear(config.hidden_size, config.num_key_value_heads, bias=False)
            # Neutral: zero vectors behind gates of one.
            self.value_embedding.starts_at_zero = self.value_gate.starts_at_zero = True
        self.distance_weight: nn.Parameter | None = None
        if config.attention_score != "dot":
            self.distance_weight = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.rotary_frequencies: nn.Parameter | None = None
        if config.rotary_learned_frequencies:
            frequencies, self.rotary_scaling = rotary_frequencies(config)
            # At least in single precision whatever the model is in: a position multiplies their rounding error.
            accurate = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.rotary_frequencies = nn.Parameter(frequencies.to(accurate).repeat(config.num_key_value_heads, 1))

    def reset_own_parameters(self):
        """λ = 0, where every score is the dot product, and the frequencies of the configured rope type."""
        if self.distance_weight is not None:
            init.zeros_(self.distance_weight)
        if self.rotary_frequencies is not None:
            init.copy_(self.rotary_frequencies, rotary_frequencies(self.config)[0].expand_as(self.rotary_frequencies))

    def learned_rotation(
        self, position_ids: torch.LongTensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[B, K, S, r]` of this layer's own frequencies, which learn through them."""
        frequencies = local(self.rotary_frequencies)[:, None, :]
        accurate = torch.promote_types(frequencies.dtype, torch.float32)
        angles = position_ids[:, None, :, None].to(accurate) * frequencies.to(accurate)
        return cos_sin(angles, self.rotary_scaling, dtype)

    def gated_value_embedding(self, hidden_states: torch.Tensor, input_ids: torch.LongTensor) -> torch.Tensor:
        """What the tokens themselves add to the values, `[B, S, K·h]`; a gate between 0 and 2 per head, first 1."""
        assert self.value_embedding is not None and self.value_gate is not None
        # Looked up by hand, so that tensor parallelism finds the vectors of its own heads only.
        vectors = nn.functional.embedding(input_ids, local(self.value_embedding.weight))
        gate = 2 * torch.sigmoid(self.value_gate(hidden_states))  # [B, S, K]
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
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, H, S, h]
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, K, S, h]
        value = self.v_proj(hidden_states)
        if self.value_embedding is not None:
            value = value + self.gated_value_embedding(hidden_states, input_ids)
        value = value.view(head_shape).transpose(1, 2)

        if self.qk_norm_eps is not None:
            query, key = (nn.functional.rms_norm(x, (self.head_dim,), eps=self.qk_norm_eps) for x in (query, key))
        if self.rotary_frequencies is not None:
            cos, sin = self.learned_rotation(position_ids, query.dtype)
            query_cos, query_sin = (repeat_heads(x, self.num_key_value_groups) for x in (cos, sin))
            query, key = rotate(query, query_cos, query_sin), rotate(key, cos, sin)
        elif position_embeddings is not None:
            cos, sin = (x[:, None] for x in position_embeddings)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        backend = self.config._attn_implementation
        if self.attention_score != "dot":
            # The paged cache of continuous batching is otherwise filled inside the backend, behind the score.
            if (paged_cache := kwargs.pop("cache", None)) is not None:
                key, value = update_paged_cache(paged_cache, key, value, self.layer_idx, kwargs)
            backend = backend.removeprefix("paged|")
        # After the cache, which keeps plain keys: a rotation or a new λ must not leave stale coordinates in it.
        if self.attention_score == "squared_distance":
            query, key, value = squared_distance_as_dot(query, key, value, local(self.distance_weight))

        if self.attention_score == "distance":
            check_distance_backend(backend)
            attention_interface = DISTANCE_BACKENDS[backend]
        else:
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        output, probabilities = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output[..., : self.head_dim].reshape(*input_shape, -1)
        return self.o_proj(output), probabilities
