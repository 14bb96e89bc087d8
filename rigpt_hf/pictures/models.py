"""Small models of Gaussian weights, for pictures."""

from typing import Any

import torch

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM


@torch.no_grad()
def gaussian_model(generator: torch.Generator, deviation: float, **options: Any) -> RiGPTForCausalLM:
    """A RiGPT in float64 whose every parameter is drawn with standard `deviation`; `options` of its configuration."""
    model = RiGPTForCausalLM(RiGPTConfig(**options)).double().eval()
    for parameter in model.parameters():
        parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
