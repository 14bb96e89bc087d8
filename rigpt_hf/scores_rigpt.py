"""
Attention scores that depend on a query and a key only through invariants of the head space, one record each.

Shapes: B batch, S new positions, T positions including the cache, H query heads, K key-value heads, h dims per head.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


# The config imports this file for the names of scores, so what takes long to import is imported where it is used.

# Attention kernels want head sizes that are multiples of this.
KERNEL_ALIGNMENT = 8
# Attention functions of the library that can bound scores.
CAPPING = ("eager", "flex_attention", "flash_attention_2", "flash_attention_3")
# And those that can add to them what differs from head to head, as distances do.
BIASING = ("eager", "sdpa", "flex_attention")
# And those that know a logit without a key; others leave it out and say nothing.
SINKING = ("eager", "flex_attention", "flash_attention_4")


# In words, each with the names of the backends that meet it. A module asks for its own once: to read a configuration
# takes microseconds, and a token waits for each layer.
Demands = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Score:
    """
    How a head weighs a key `k` for a query `q`.

    Args:
        name: The value of `attention_score` in the config.
        weighted: Whether every query head learns a `λ`, `self_attn.distance_weight`, which is zero at the dot product.
        stretch: Which common stretches of a head's queries and keys leave the score alone: `"free"`, `q/s` and `s k`
            for any invertible `s`; `"common"`, the same for one number `s`, with `λ/s²`; `"none"`.
        key_shift: When a vector `c` added to all keys leaves the softmax alone: `"alone"`; `"with_query"`, if `λc` is
            added to the queries; `"never"`.
        as_dot: Writes the score as a dot product of longer vectors: queries, keys, values and `λ` to the first three.
        modify: Makes scores of dot products, `|q|²`, `|k|²` and `λ`, which broadcast together.
        backends: Attention functions that can express a modified score; `None`: all that the library has.
    """

    name: str
    weighted: bool = False
    stretch: Literal["free", "common", "none"] = "free"
    key_shift: Literal["alone", "with_query", "never"] = "alone"
    as_dot: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    modify: Callable[..., torch.Tensor] | None = None
    backends: dict[str, Callable] | None = None

    def demands(self, config: Any) -> Demands:
        """The demands that not every backend meets."""
        demands: Demands = {}
        if self.backends is not None:
            demands[f"`attention_score={self.name!r}`, which is no dot product"] = tuple(self.backends)
        if (cap := config.attn_logit_softcapping) is not None:
            demands[f"`attn_logit_softcapping={cap}`, which bounds scores"] = CAPPING
        if config.position_embedding_type == "alibi":
            demands["`position_embedding_type='alibi'`, which adds to the scores of each head"] = BIASING
        if config.attention_sinks:
            demands["`attention_sinks=True`, which puts a logit without a key into each softmax"] = SINKING
        return demands

    def fills_cache(self, demands: Demands) -> bool:
        """
        Whether the cache of continuous batching is filled in front of the score and not in the backend: where there is
        more to the score than the library's paged backends know.
        """
        return self.weighted or bool(demands)

    def check_backend(self, backend: str, demands: Demands):
        """Raises a `ValueError` if the backend of this name cannot express the score with what else there is to it."""
        name = backend.removeprefix("paged|")
        if what := next((words for words, able in demands.items() if name not in able), None):
            raise ValueError(
                f"`attn_implementation` must be one of {', '.join(capable(demands))} for {what}, got {name!r}. Name "
                "one of these, or none."
            )

    def check_paged(self, backend: str, config: Any):
        """Raises a `ValueError` if continuous batching cannot hand over its cache before the score."""
        from transformers.generation.continuous_batching import PagedAttentionCache

        if config.position_embedding_type == "alibi":
            raise ValueError(
                "`position_embedding_type='alibi'` must not meet continuous batching, whose cache does not say how "
                f"far away a key is, got {backend!r} with one. Generate with `generate`."
            )
        demands = self.demands(config)
        if self.fills_cache(demands) and "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
            what = next(iter(demands), f"`attention_score={self.name!r}`")
            raise ValueError(
                f"`attn_implementation` must not be paged for {what} in this version of "
                f"Transformers, got {backend!r}. Update Transformers, or generate without continuous batching."
            )

    def prepare(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        weight: torch.Tensor | None,
        layer_idx: int,
        demands: Demands,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The arguments of the backend, from queries `[B, H, S, h]`, plain keys and values `[B, K, T, h]` and `λ` `[H]`.

        After the cache, which keeps plain keys: a rotation or a new `λ` must not leave stale coordinates in it. So the
        cache of continuous batching, among the `kwargs`, is filled here and not behind the score, in the backend.
        """
        if self.fills_cache(demands) and (paged_cache := kwargs.pop("cache", None)) is not None:
            key, value = update_paged_cache(paged_cache, key, value, layer_idx, kwargs)
        return (query, key, value) if self.as_dot is None else self.as_dot(query, key, value, local(weight))

    def backend(self, name: str, demands: Demands) -> tuple[str, Callable | None]:
        """The name of the backend to use, and its function where it is not the library's."""
        if demands:
            self.check_backend(name, demands)
        name = name.removeprefix("paged|") if self.fills_cache(demands) else name
        if name == "flex_attention" and demands:
            return name, flex_attention_forward
        return name, None if self.backends is None else self.backends[name]


def capable(demands: Demands) -> list[str]:
    """Names of the backends that meet all demands; none named: all do."""
    lists = list(demands.values())
    return [name for name in lists[0] if all(name in other for other in lists)] if lists else []


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
    half_norm = -0.5 * squared_norm(key)[..., None]
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


def squared_norm(states: torch.Tensor) -> torch.Tensor:
    """`|x|²` over the last dimension, summed in at least single precision."""
    return states.to(torch.promote_types(states.dtype, torch.float32)).square().sum(-1)


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, K, T, h]` to `[B, K·groups, T, h]`, every key-value head repeated for its query heads."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's shard of a parameter that tensor parallelism splits by heads; otherwise the parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention written out, for any score. Returns `[B, S, H, h]` and the probabilities `[B, H, S, T]`, which with sinks
    `s_aux` `[H]` sum to less than 1: the rest is that of the sink, which has no value.
    """
    key, value = (repeat_heads(states, module.num_key_value_groups) for states in (key, value))
    scores = query @ key.transpose(2, 3)
    if module.score.modify is not None:
        scores = module.score.modify(
            scores.to(torch.promote_types(scores.dtype, torch.float32)),
            squared_norm(query)[..., :, None],
            squared_norm(key)[..., None, :],
            local(module.distance_weight)[:, None, None],
        )
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    accurate, length = torch.promote_types(query.dtype, torch.float32), scores.shape[-1]
    if s_aux is not None:
        sinks = s_aux[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=accurate)[..., :length].to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def flex_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    A score that is modified, or less a distance, or beside a sink, in FlexAttention. Returns `[B, S, H, h]` and no
    probabilities.
    """
    from transformers.integrations import flex_attention

    if dropout > 0:
        raise ValueError(
            f"`attention_dropout` must be 0 to train with 'flex_attention', got {dropout}. Set it to 0 or load with "
            "attn_implementation='eager'."
        )
    if s_aux is not None and needs_eager(query):
        raise ValueError(
            "`attn_implementation` must be 'eager' for `attention_sinks=True` on a CPU, where FlexAttention does not "
            "say what its softmax divided by, got 'flex_attention'. Move the model to a GPU, or load it with 'eager'."
        )
    groups, modify = module.num_key_value_groups, module.score.modify
    if modify is not None:
        query_norm, key_norm, weight = squared_norm(query), squared_norm(key), local(module.distance_weight).float()
    slopes = None if module.alibi is None else local(module.alibi.weight).float()
    # The column of the first query; from another one, as in a cache of fixed size, distances differ by a constant.
    first = key.shape[2] - query.shape[2]

    def score_mod(dot, batch, head, query_index, key_index):
        score = dot
        if modify is not None:
            norms = query_norm[batch, head, query_index], key_norm[batch, head // groups, key_index]
            score = modify(dot, *norms, weight[head])
        score = score * scaling
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return score if slopes is None else score - slopes[head] * (query_index + first - key_index)

    output = flex_attention.compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        score_mod=score_mod,
        block_mask=attention_mask,
        enable_gqa=groups > 1,
        scale=1.0,
        kernel_options=kwargs.get("kernel_options"),
        **({} if s_aux is None else flex_attention.get_flex_attention_lse_kwargs(True)),
    )
    if s_aux is not None:
        output = beside_sinks(output[0], getattr(output[1], "lse", output[1]), s_aux)  # PyTorch before 2.9: as it is
    return output.transpose(1, 2).contiguous(), None


def needs_eager(states: torch.Tensor) -> bool:
    """Whether FlexAttention keeps the logarithm of what its softmax divides by to itself."""
    return states.device.type == "cpu"


def beside_sinks(output: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """
    The output `[B, H, S, h]` of attention whose softmax has one more logit, `sinks` `[H]`, from that without it.

    `logsumexp` `[B, H, S]` of the scores: probabilities get the factor `exp(l) / (exp(l) + exp(sink))`.
    """
    return output * torch.sigmoid(logsumexp - sinks[:, None])[..., None].to(output.dtype)


def update_paged_cache(
    cache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store new keys and values in the cache of continuous batching; returns all of them, `[1, K, T, h]`."""
    if kwargs.get("block_table") is not None:
        raise ValueError(
            "`max_blocks_per_request` of the continuous batching config must be 0 for scores that are more than a dot "
            "product, whose keys no kernel may fetch by itself. Set it to 0."
        )
    return cache.update(key_states=key, value_states=value, layer_idx=layer_idx, kwargs=kwargs)


SCORES = {
    score.name: score
    for score in (
        # q·k
        Score("dot"),
        # q·k - λ|k|²/2, for λ = 1 the negative half of |q-k|² up to a constant of the query
        Score(
            "squared_distance",
            weighted=True,
            stretch="common",
            key_shift="with_query",
            as_dot=squared_distance_as_dot,
        ),
        # (1-λ) q·k - λ|q-k|, no dot product in any number of dimensions
        Score(
            "distance",
            weighted=True,
            stretch="none",
            key_shift="never",
            modify=distance_score,
            backends={"eager": eager_attention_forward, "flex_attention": flex_attention_forward},
        ),
    )
}
