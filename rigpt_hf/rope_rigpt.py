"""Rotary positions: frequencies and their check, angles, and the rotation of queries and keys by them."""

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .layers_rigpt import FULL, LAYER_TYPES, by_layer_type, of_layer_type


# These rope types change their frequencies with the length of the input, so nothing fixed could be learned.
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")


def rotary_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """Frequencies `[r/2]` in radians per position and the scaling of cosines and sines, for any rope type."""
    rope_type = config.rope_parameters["rope_type"]
    return default_rotary_frequencies(config) if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type](config)


def default_rotary_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """Frequencies `theta^(-2i/r)` `[r/2]` of RoPE (arXiv 2104.09864) and the scaling 1 of its cosines and sines."""
    dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


def check_rope_types(config: Any) -> None:
    """A `ValueError` that names a type of rope parameters that is not known, of any type of layer."""
    for kind in rope_kinds(config):
        check_rope_type(of_layer_type(config, kind))


def rope_kinds(config: Any) -> list[str]:
    """The types of layers that have rope parameters of their own; one that stands for all where they share them."""
    return (
        [kind for kind in LAYER_TYPES if kind in config.rope_parameters]
        if by_layer_type(config.rope_parameters)
        else [FULL]
    )


def check_rope_type(config: Any) -> str:
    """The type of the rope parameters; a `ValueError` that names it if there is no such type."""
    parameters, known = config.rope_parameters or {}, ("default", *ROPE_INIT_FUNCTIONS)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in known:
        raise ValueError(
            f"`rope_parameters['rope_type']` must be one of {', '.join(dict.fromkeys(known))}, got {rope_type!s:.80}."
        )
    return rope_type


def check_rotation(config: Any) -> None:
    """Raise a `ValueError` if the rope parameters do not give a finite frequency for every pair that turns."""
    for kind in rope_kinds(config):
        _check_rotation(of_layer_type(config, kind))


def _check_rotation(config: Any) -> None:
    parameters, rope_type = config.rope_parameters or {}, check_rope_type(config)
    part = parameters.get("partial_rotary_factor", 1.0)
    if not isinstance(part, (int, float)) or not 0 < part < math.inf:
        raise ValueError(f"`rope_parameters['partial_rotary_factor']` must be a number above 0, got {part!r}.")
    rotated = int(config.head_dim * part)
    if rotated < 2 or rotated % 2 or rotated > config.head_dim:
        raise ValueError(
            "`head_dim` times `partial_rotary_factor` must be even with `position_embedding_type='rotary'`, which "
            f"turns dimensions in pairs, and at most `head_dim`, got {rotated}. Change `head_dim`."
        )
    # Dimensions that this type leaves alone have the frequency 0.
    count = config.head_dim // 2 if rope_type == "proportional" else rotated // 2
    try:
        with torch.device("cpu"):
            frequencies, scaling = rotary_frequencies(config)
            factors = [parameters.get(name, []) for name in ("short_factor", "long_factor")]
            lengths = {len(frequencies), *(len(each) for each in factors if rope_type == "longrope")}
            possible = lengths == {count} and bool((frequencies.isfinite() & (frequencies >= 0)).all())
        problem = "" if possible and math.isfinite(scaling) else f"not {count} finite frequencies"
    except (LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        problem = f"{error} is missing" if isinstance(error, LookupError) else "a value is impossible"
    if problem:
        raise ValueError(
            f"`rope_parameters` must hold all numbers that `rope_type={rope_type!r}` needs, got {parameters!s:.80}: "
            f"{problem:.80}."
        )


def check_learned_frequencies(config: Any) -> None:
    """Raise a `ValueError` if a configuration has no frequencies, or none that could be learned."""
    if config.position_embedding_type != "rotary":
        raise ValueError(
            "`rotary_learned_frequencies` needs `position_embedding_type='rotary'`, got "
            f"{config.position_embedding_type!r}."
        )
    if dependent := rope_types(config) & set(LENGTH_DEPENDENT_ROPE_TYPES):
        raise ValueError(
            "`rotary_learned_frequencies` needs a `rope_type` whose frequencies do not depend on the length of "
            f"the input, got {min(dependent)!r}. Use 'default', 'linear', 'llama3', 'yarn' or 'proportional'."
        )


def rope_types(config: Any) -> set[str]:
    """The `rope_type` of every type of layer."""
    return {of_layer_type(config, kind).rope_parameters["rope_type"] for kind in rope_kinds(config)}


class RiGPTRotaryEmbedding(nn.Module):
    """Angles of the position rotation `exp(p·A)`: cosines and sines `[B, S, r]` at the library's frequencies."""

    def __init__(self, config: Any, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = rotary_frequencies(config)
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.to(device, copy=True), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, *_, **__) -> tuple[torch.Tensor, float]:
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
