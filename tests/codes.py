"""Codes of tiny models, rounded to the nearest."""

from dataclasses import dataclass

import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.quantized_rigpt import HEAD, TABLE, RiGPTQuantizationConfig, convertible, to_quantized
from tests.models import tiny_model


@dataclass(frozen=True)
class Codes:
    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int | None
    gain: torch.Tensor | None = None


# Grouped heads and all biases in both; maps of every length that groups divide, and of others.
CODED: dict[str, dict] = {
    "tied": {},
    "untied-projected": {
        "embedding_size": 64,
        "output_bias": True,
        "tie_word_embeddings": False,
        "gated_mlp": True,
        "hidden_act": "silu",
        "intermediate_size": 48,
        "value_embedding_period": 2,
    },
}


def rounded(weight: torch.Tensor, bits: int, group: int | None = None, gain: torch.Tensor | None = None) -> Codes:
    """The nearest codes to a matrix, with the smallest scales that reach its largest numbers."""
    weight = weight.detach().to(torch.float64) / (1.0 if gain is None else gain.to(torch.float64))
    columns, reach = weight.shape[1], 2 ** (bits - 1)
    groups = weight.unflatten(-1, (columns // (group or columns), -1))
    scales = (groups.abs().amax(-1) / (reach - 0.5)).to(torch.float16).clamp(min=2.0**-20).to(torch.float32)
    codes = (groups / scales[..., None]).round().clamp(-reach, reach - 1).to(torch.int8)
    return Codes(codes.flatten(-2), scales, bits, group, gain)


def codes_of(model: RiGPTForCausalLM, group: int | None = 32, keep: tuple[str, ...] = ()) -> dict[str, Codes]:
    """Codes of 4 bits in groups where they fit, tables in 8, factors of the inputs of `o_proj`."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, module in convertible(model).items():
        if name in keep or (name == HEAD and model.config.tie_word_embeddings):
            continue
        columns = module.weight.shape[1]
        gain = (torch.rand(columns, generator=generator) + 0.5).half().float() if name.endswith("o_proj") else None
        is_table = name in (TABLE, HEAD)
        own = None if is_table or columns % (group or 1) else group
        made[name] = rounded(module.weight, 8 if is_table else 4, own, gain)
    return made


def quantized(
    option: str, dtype: torch.dtype = torch.float32, group: int | None = 32, keep: tuple[str, ...] = (), **options
) -> RiGPTForCausalLM:
    """The tiny model of `CODED[option]`, made of codes."""
    model = tiny_model(dtype=dtype, **(CODED[option] | options))
    return to_quantized(model, codes_of(model, group, keep), RiGPTQuantizationConfig(group=group))
