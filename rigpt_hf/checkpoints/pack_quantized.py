"""
The layout `pack-quantized` of compressed-tensors, which vLLM reads: `W = c s`, whole numbers `c` and a scale for each
row or group of neighbours in it.

Of a map `[m, n]` of b bits a file has `weight_packed` `[m, ceil(b n / 32)]` of int32, whose lowest bits hold the first
`c + 2**(b - 1)` of a word, `weight_scale` `[m, n / group]`, and `weight_shape`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .weights import check_finite, name_some, stored_tensors


METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
WORD = 32
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[m, n]` of 4 or 8 bits, as words `[m, ceil(bits n / 32)]` of int32."""
    many = WORD // bits
    shifted = nn.functional.pad(codes.to(torch.int32) + 2 ** (bits - 1), (0, -codes.shape[-1] % many))
    return (shifted.unflatten(-1, (-1, many)) << _places(bits)).sum(-1, dtype=torch.int32)


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes `[m, n]` of int8, from words of int32."""
    parts = (words[..., None] >> _places(bits)) & (2**bits - 1)
    return (parts.flatten(-2)[..., :columns] - 2 ** (bits - 1)).to(torch.int8)


def _places(bits: int) -> torch.Tensor:
    return torch.arange(0, WORD, bits, dtype=torch.int32)


def layout(bits: int, group: int | None, ignore: list[str]) -> dict[str, Any]:
    """
    The `quantization_config` of a folder.

    Args:
        bits (`int`): 4 or 8.
        group (`int`, *optional*): neighbours in a row that share a scale; the whole row if not given.
        ignore (`list[str]`): linear maps that have weights.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }


def bits_of(given: Any) -> int | None:
    """The bits of all maps that have codes in this layout, symmetric ones; `None` where there is anything else."""
    groups = given.get("config_groups") if isinstance(given, Mapping) and given.get("format") == LAYOUT else None
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    if len(schemes) != 1 or not isinstance(schemes[0], Mapping):
        return None
    weights, *others = (schemes[0].get(key) for key in ("weights", "input_activations", "output_activations"))
    if not isinstance(weights, Mapping) or any(others) or schemes[0].get("format") not in (None, LAYOUT):
        return None
    is_plain = weights.get("type") == "int" and weights.get("symmetric") is True and not weights.get("actorder")
    return next((bits for bits in (4, 8) if is_plain and weights.get("num_bits") == bits), None)


def decoded_tensors(folder: Path, bits: int, argument: str = "source") -> dict[str, torch.Tensor]:
    """
    The tensors of a folder by name, products of codes and scales in float32, where none is rounded.

    Raises:
        ValueError: if parts of a map are missing or do not belong together.
    """
    files = {tensor.file for tensor in stored_tensors(folder, argument).values()}
    tensors = {name: tensor for file in sorted(files) for name, tensor in load_file(file).items()}
    for name in [name for name in tensors if name.endswith(f".{PARTS[0]}")]:
        module = name.removesuffix(f".{PARTS[0]}")
        if lost := [part for part in PARTS if f"{module}.{part}" not in tensors]:
            raise ValueError(f"`{argument}` must hold all parts of a map, got {name!r} without {name_some(lost)}.")
        words, scales, shape = (tensors.pop(f"{module}.{part}") for part in PARTS)
        rows, columns = shape.tolist() if shape.shape == (2,) and shape.dtype == torch.int64 else (0, 0)
        fits = words.dtype == torch.int32 and words.shape == (rows, -(-columns * bits // WORD))
        if (
            not fits
            or scales.dim() != 2
            or len(scales) != rows
            or columns % max(scales.shape[1], 1)
            or not scales.numel()
        ):
            raise ValueError(
                f"`{argument}` must hold codes of {bits} bits and their scales, got {name!r} of {list(words.shape)} "
                f"and scales of {list(scales.shape)} for a map of {shape.tolist()}."
            )
        check_finite(f"{module}.weight_scale", scales, str(folder))
        codes = unpack_words(words, bits, columns).unflatten(-1, (scales.shape[1], -1))
        tensors[f"{module}.weight"] = (codes * scales.float()[..., None]).flatten(-2)
    return tensors
