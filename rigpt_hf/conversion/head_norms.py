"""
Norms of heads on the way back: gains as a stock class has them, and rows in a frame in which a LayerNorm does nothing.

A stock LayerNorm of a head subtracts the mean, which rows without one, `1ᵀ [W, b] = 0`, leave at zero. With gains on
single dimensions a head turns by signs alone: the frames "gains" and "head_qk" make that `sᵀ [W, b] = 0`, and undo it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from ..symmetry import GaugeTransformation
from ..table import FrameKey
from .frames import ROUNDING
from .gains import as_vectors, rows_of_heads
from .maps import Family


State = dict[str, torch.Tensor]


def in_stock_norms(config: RiGPTConfig, state: State, family: Family, skeleton: Mapping[str, torch.Tensor]) -> State:
    """
    The weights of a RiGPT with the gains and the biases that the norms of heads of a stock class have.

    Args:
        config (`RiGPTConfig`), state (`dict[str, torch.Tensor]`): the RiGPT.
        family (`Family`), skeleton (`Mapping[str, torch.Tensor]`): the weight map and the tensors of the class.

    Raises:
        ValueError: if there are none; the message names the parameter and says why.
    """
    norms = {rule.target: rule for rule, _ in family.expand(config) if rule.gain}
    if not norms:
        return state
    size, tolerance = config.head_dim, ROUNDING[state["model.embed_tokens.weight"].dtype]
    stored = [f"{rule.source}.weight" for rule in norms.values()]
    # Every head has gains of its own, in one tensor or in modules of their own.
    each = any(name not in skeleton or skeleton[name].numel() > size for name in stored)
    state = as_vectors(state, tolerance, each) if config.qk_norm_gain == "metric" else dict(state)
    readers = {f"{rule.target}.weight": rule.behind for rule, _ in family.expand(config) if rule.behind in norms}
    for name, norm in readers.items():
        gain = state.get(f"{norm}.weight", state[name].new_ones(size))  # those that are absent are 1
        state[f"{norm}.weight"] = rows_of_heads(gain, len(state[name])) if each else gain
    if not any(rule.mean for rule in norms.values()):
        return state
    form = {"qk_norm_gain": "vector_per_head" if each else "vector"}
    state = _without_signs(RiGPTConfig(**(config.to_dict() | form)), state, tolerance)
    for name, norm in readers.items():
        heads = _rows(state, name, size)
        parts = heads.sum(1).norm(dim=1) / heads.norm(dim=(1, 2)).clamp_min(1e-300)
        if parts.max() > tolerance:
            raise ValueError(
                f"`{name}` has no counterpart in {family.name}, whose norms of heads subtract a mean: with no signs "
                f"that {'a head' if each else 'heads which share gains'} can take are the rows of head "
                f"{int(parts.argmax())} without one, {float(parts.max()):.1e} of their size. Export the model as it "
                "was before its queries and keys were trained, or keep it as RiGPT."
            )
        if (bias := f"{norm}.bias") in state and not each:
            biases = state[bias].to(torch.float64).unflatten(0, (-1, size))
            if (biases - biases[:1]).norm() > tolerance * biases.norm():
                raise ValueError(
                    f"`{bias}` has no counterpart in {family.name}, whose heads share one, and is not the same in all "
                    "of them. Keep this model as RiGPT."
                )
            state[bias] = biases[0]
    return state


def _rows(state: State, name: str, size: int) -> torch.Tensor:
    """The rows of all heads of a map, with its bias as one more column, `[heads, h, n]`, in float64."""
    weight, bias = state[name], state.get(name.removesuffix("weight") + "bias")
    rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    return rows.to(torch.float64).unflatten(0, (-1, size))


def _signs(heads: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The signs `[heads, h]` with which rows `[heads, h, n]` add up to nothing: none, or those of what they lack."""
    least = torch.linalg.eigh(heads @ heads.mT).eigenvectors[..., 0]
    add_up = heads.sum(1).norm(dim=1) <= tolerance * heads.norm(dim=(1, 2))
    return torch.where((least < 0) & ~add_up[:, None], -1.0, 1.0).to(torch.float64).cpu()


def _without_signs(config: RiGPTConfig, state: State, tolerance: float) -> State:
    """The same function, rows without a mean in every head, as far as signs make it so."""
    elements: dict[FrameKey, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        names = (f"model.layers.{layer}.self_attn.{of}_proj.weight" for of in "qk")
        queries, keys = (_signs(_rows(state, name, config.head_dim), tolerance) for name in names)
        queries = queries.unflatten(0, (len(keys), -1))
        if config.qk_norm_gain == "vector_per_head":
            elements[FrameKey("gains", layer)] = torch.cat([queries, keys[:, None]], 1)
            continue
        elements[FrameKey("gains", layer)] = torch.stack([queries[0, 0], keys[0]])[None]
        elements |= _half_turns(config, state, layer, keys * keys[0])
    transformation = GaugeTransformation(config, elements)
    return {name: transformation.transform(name, tensor, state.__getitem__) for name, tensor in state.items()}


def _half_turns(config: RiGPTConfig, state: State, layer: int, signs: torch.Tensor) -> dict[FrameKey, torch.Tensor]:
    """
    The elements that make all heads alike which share gains, from the signs of each against the first, `[heads, h]`.

    Rows say these up to one sign of the whole head, and biases behind the norms say that.
    """
    frames, turns, shift = table_of(config).frames, FrameKey("head_qk", layer), FrameKey("key_shift", layer)
    group: Any = frames[turns].group
    signs = group.spread(group.gather(signs, [0]))
    if not config.qk_norm_bias:
        return {turns: signs}
    names = (f"model.layers.{layer}.self_attn.{of}_norm.bias" for of in "qk")
    queries, keys = (state[name].double().cpu().reshape(len(signs), -1, config.head_dim) for name in names)
    # What all keys have in common is no part of the function.
    free = frames[shift].group.project(keys[:, 0]) if shift in frames else torch.zeros_like(keys[:, 0])
    biases = (torch.cat([queries, (keys[:, 0] - free)[:, None]], 1) * signs[:, None]).flatten(1)
    signs = torch.where(biases @ biases[0] < 0, -1.0, 1.0)[:, None] * signs
    elements = {turns: signs}
    if shift in frames:
        elements[shift] = frames[shift].group.project(signs * keys[0] - keys[:, 0])
    return elements
