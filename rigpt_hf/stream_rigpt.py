"""What acts on whole vectors of the stream, and so commutes with its rotations or carries them along."""

import torch
from torch import nn


class RiGPTRMSNorm(nn.Module):
    """`n(x) = x / sqrt(mean(x²) + eps)`: RMSNorm without the gain, hence without a basis."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)

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


def freeze_transports(model: nn.Module) -> None:
    """Once more after loading, which makes every parameter a trainable one."""
    for module in model.modules():
        if isinstance(module, RiGPTTransport):
            module.weight.requires_grad_(False)


__all__ = ["RiGPTRMSNorm", "RiGPTTransport", "RiGPTVectorDropout", "freeze_transports"]
