"""
The norm without a gain, `n(x) = x / sqrt(mean(x²) + eps)`, and norms of queries and keys: without a gain, with one, or
with a metric in its place, and with a bias behind them.

Shapes: B batch, S positions, h dims per head.
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from .kernels_rigpt import is_recorded
from .scores_rigpt import local


QK_NORM_GAINS = ("vector", "vector_per_head", "metric")
QK_NORM_OVER = ("head", "all")


# Of numbers of 16 bits, up to so many are done sooner by torch, which casts them and back in the same calls.
FEW_NUMBERS = 2**16


def unit(states: torch.Tensor, eps: float) -> torch.Tensor:
    """
    `n(x)` along the last axis, in few calls on a CPU.

    There torch has a kernel for LayerNorm and none for RMSNorm, which it puts together from ten operations. `make
    bench` shows what this brings. The result is what the backward pass keeps, as the next linear map does anyway:
    whoever changes it in place while training is told so by autograd, and has to clone it first.

    Args:
        states (`torch.Tensor` of shape `[..., n]`).
        eps (`float`): added to the mean square.
    """
    learns = states.requires_grad and torch.is_grad_enabled()
    if (
        type(states) is not torch.Tensor  # of shards, which know better
        or states.device.type != "cpu"
        or (states.element_size() <= 2 and states.numel() <= FEW_NUMBERS and not learns)
        or is_recorded()
    ):
        return nn.functional.rms_norm(states, states.shape[-1:], eps=eps)
    return (_Unit.apply if learns else _unit)(states, eps)[0]


def _unit(states: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`n(x)`, and `1 / sqrt(mean(x²) + eps)` `[..., 1]` in 32 bits or more."""
    accurate = states if states.element_size() > 2 else states.float()
    length = torch.linalg.vector_norm(accurate, dim=-1, keepdim=True)
    inverse = torch.addcmul(_number(eps, length.dtype), length, length, value=1 / states.shape[-1]).rsqrt_()
    if accurate is states:
        return states * inverse, inverse
    # The copy is ours, unless somebody is to see what became of it.
    product = accurate * inverse if torch.is_grad_enabled() else accurate.mul_(inverse)
    return product.to(states.dtype), inverse


@lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor, which takes as long to make as all that a token needs of it."""
    with torch.inference_mode(False):  # or it could be used in this mode only, whoever asks first
        return torch.full((), value, dtype=dtype, device="cpu")


class _Unit(torch.autograd.Function):
    """
    `n(x)` and `r = 1 / sqrt(mean(x²) + eps)`, both of which later derivatives go through.

    The Jacobian of `y = n(x)` is `r (1 - y yᵀ / n)`, which is symmetric, and the derivative of `r` is `-r² y / n`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(states: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        return _unit(states, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_unit: torch.Tensor | None, of_inverse: torch.Tensor | None) -> tuple:
        result = None if of_unit is None else _along(ctx.saved_tensors, of_unit)
        if of_inverse is not None:
            unit, inverse = ctx.saved_tensors
            other = (of_inverse * inverse.square() * unit / -unit.shape[-1]).to(unit.dtype)
            result = other if result is None else result + other
        return result, None

    @staticmethod
    def jvp(ctx: Any, change: torch.Tensor, _: None) -> tuple[torch.Tensor, torch.Tensor]:
        unit, inverse = ctx.saved_tensors
        of_inverse = (unit * change).sum(-1, keepdim=True) * inverse.square() / -unit.shape[-1]
        return _along(ctx.saved_tensors, change), of_inverse.to(inverse.dtype)


def _along(saved: tuple[torch.Tensor, ...], change: torch.Tensor) -> torch.Tensor:
    """`r (v - y <y, v> / n)`: the Jacobian applied to `v`."""
    unit, inverse = saved
    unit, accurate = unit.to(inverse.dtype), change.to(inverse.dtype)
    if torch.is_autocast_enabled(unit.device.type):  # under which a dot product is one of 16 bits
        dot = (unit * accurate).sum(-1, keepdim=True)
    else:
        dot = torch.linalg.vecdot(unit, accurate).unsqueeze(-1)
    share = dot / -unit.shape[-1]
    return (torch.addcmul(accurate, unit, share) * inverse).to(change.dtype)


def check_head_norms(config: Any) -> None:
    """Raise a `ValueError` if what norms of queries and keys have does not fit together."""
    config._check_choice("qk_norm_over", QK_NORM_OVER)
    if config.qk_norm_gain is not None:
        config._check_choice("qk_norm_gain", QK_NORM_GAINS)
    for name, default in (("qk_norm_over", "head"), ("qk_norm_gain", None), ("qk_norm_bias", False)):
        if (value := getattr(config, name)) != default and not config.qk_norm:
            raise ValueError(
                f"`{name}` needs `qk_norm=True`, got {value!r} with {config.qk_norm}. Set `qk_norm`, or leave "
                f"`{name}` out."
            )
    if config.qk_norm_gain == "vector_per_head" and config.qk_norm_over == "all":
        raise ValueError(
            "`qk_norm_gain='vector_per_head'` is for heads with lengths of their own, got `qk_norm_over='all'`, where "
            "every head has gains of its own anyway. Use 'vector'."
        )


def gain_vectors(config: Any) -> Literal["shared", "own"] | None:
    """Whether norms of queries and keys have a vector of gains that all heads share, or one for each head."""
    if config.qk_norm_gain not in ("vector", "vector_per_head"):
        return None
    return "own" if config.qk_norm_gain == "vector_per_head" or config.qk_norm_over == "all" else "shared"


class RiGPTHeadNorm(nn.Module):
    """
    `n(x)` for heads of queries or keys `[B, heads, S, h]`; `together`: by the length of all heads together. `biases`:
    of so many heads times `h`, which are added behind.
    """

    def __init__(self, eps: float, together: bool = False, biases: int | None = None):
        super().__init__()
        self.eps, self.together = eps, together
        self.bias = None if biases is None else nn.Parameter(torch.zeros(biases))

    def reset_own_parameters(self):
        """No bias."""
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalised = self.normalised(hidden_states)
        if self.bias is None:
            return normalised
        return normalised + local(self.bias).to(normalised.dtype).view(-1, 1, hidden_states.shape[-1])

    def normalised(self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """`g n(x)`, for gains of a head that all of them share, or of all heads."""
        size = hidden_states.shape[-1]
        if self.together:
            heads = hidden_states.transpose(1, 2)  # as the map in front gave them
            flat = heads.flatten(2)
            return nn.functional.rms_norm(flat, flat.shape[-1:], gain, self.eps).view(heads.shape).transpose(1, 2)
        if gain is None:
            return unit(hidden_states, self.eps)
        if len(gain) == size:
            return nn.functional.rms_norm(hidden_states, (size,), gain, self.eps)
        accurate = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return (unit(accurate, self.eps) * gain.view(-1, 1, size)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, together={self.together}, bias={self.bias is not None}"


class RiGPTGainNorm(RiGPTHeadNorm):
    """`g n(x)`, with a gain per dimension, of a head that shares them with all others, or of all heads."""

    def __init__(self, size: int, eps: float, together: bool = False, biases: int | None = None):
        super().__init__(eps, together, biases)
        self.weight = nn.Parameter(torch.ones(size))

    def reset_own_parameters(self):
        """No gain, and no bias."""
        super().reset_own_parameters()
        init.ones_(self.weight)

    def normalised(self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return super().normalised(hidden_states, local(self.weight).to(hidden_states.dtype))


class RiGPTMetricNorm(RiGPTHeadNorm):
    """
    `x / sqrt(|L x|²/h + eps)`: `n(x)` for the length that the metric `Lᵀ L` gives, in any frame of the head.

    `weight` `[heads·h, h]` has an `L` for each of them. With `L = diag(1/g)` and `g x` for `x` this is `g n(x)`.
    """

    def __init__(self, heads: int, size: int, eps: float, together: bool = False, biases: int | None = None):
        super().__init__(eps, together, biases)
        self.weight = nn.Parameter(torch.eye(size).repeat(heads, 1))

    def reset_own_parameters(self):
        """The ordinary length, and no bias."""
        super().reset_own_parameters()
        size = self.weight.shape[1]
        init.copy_(self.weight, torch.eye(size).repeat(len(self.weight) // size, 1))

    def normalised(self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        size = hidden_states.shape[-1]
        mapped = hidden_states @ local(self.weight).to(hidden_states.dtype).view(-1, size, size).mT  # [B, heads, S, h]
        accurate = torch.promote_types(hidden_states.dtype, torch.float32)
        square = mapped.to(accurate).square().mean((1, 3) if self.together else -1, keepdim=True)
        return (hidden_states.to(accurate) * torch.rsqrt(square + self.eps)).to(hidden_states.dtype)


def head_norm(config: Any, of: Literal["query", "key"]) -> RiGPTHeadNorm | None:
    """The norm of queries or keys, if they have one."""
    if not config.qk_norm:
        return None
    heads = config.num_attention_heads if of == "query" else config.num_key_value_heads
    size = config.head_dim
    how = config.rms_norm_eps, config.qk_norm_over == "all", heads * size if config.qk_norm_bias else None
    if config.qk_norm_gain == "metric":
        return RiGPTMetricNorm(heads, size, *how)
    vectors = gain_vectors(config)
    return RiGPTHeadNorm(*how) if vectors is None else RiGPTGainNorm(size * (heads if vectors == "own" else 1), *how)
