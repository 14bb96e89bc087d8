"""Biases that a stock class has no place for, and heads in an order of ours, on the way back to stock."""

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.weights import name_some
from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from ..symmetry import GaugeTransformation
from ..table import FrameKey
from .frames import ROUNDING
from .maps import Family, Rule, module_of


State = dict[str, torch.Tensor]


def without_bias(config: RiGPTConfig, family: Family, skeleton: Mapping[str, torch.Tensor]) -> dict[str, Rule]:
    """The biases of a RiGPT's layers whose maps have none in a stock class, which has the tensors of `skeleton`."""
    stored = {
        module_of(part)
        for name, example in skeleton.items()
        for part in family.experts.shapes(name, tuple(example.shape)) or (name,)
    }
    return {
        f"{rule.target}.bias": rule
        for rule, layer in family.expand(config)
        if layer >= 0 and rule.source is not None and (rule.source, "bias") not in stored
    }


def settled(config: RiGPTConfig, state: State, family: Family, skeleton: Mapping[str, torch.Tensor]) -> State:
    """
    The weights of a RiGPT without biases that a stock class has no place for.

    One in front of which a norm centres and has a bias has its place there. The others must be zero, up to
    translations of the table of frames, which are undone: what values have in common is written by their own biases.

    Args:
        config (`RiGPTConfig`), state (`dict[str, torch.Tensor]`): the RiGPT.
        family (`Family`), skeleton (`Mapping[str, torch.Tensor]`): the weight map and the tensors of the class.

    Raises:
        ValueError: if a bias has no place; the message names it.
    """
    in_norms = family.centred and family.norm_bias
    homeless = {name for name, rule in without_bias(config, family, skeleton).items() if not (in_norms and rule.norm)}
    before = {name: norm for name in homeless & state.keys() if (norm := float(state[name].to(torch.float64).norm()))}
    state = dict(state)

    def read(name: str) -> torch.Tensor:
        return state[name].to(torch.float64)

    for shift in table_of(config).shifts.values():
        for name in shift.moves.keys() & before.keys() - {shift.like}:
            move, start = shift.moves[name], torch.zeros_like(read(shift.like))
            matrix = torch.func.jacfwd(lambda vector, move=move: move(vector, read))(start).cpu()
            # The driver for a CPU knows matrices of less than full rank.
            vector = torch.linalg.lstsq(matrix, -read(name).cpu()[:, None]).solution[:, 0].to(start.device)
            state |= {moved: read(moved) + change(vector, read) for moved, change in shift.moves.items()}
    rounding = ROUNDING[state["model.embed_tokens.weight"].dtype]
    if left := [name for name, norm in before.items() if float(read(name).norm()) > rounding * norm]:
        raise ValueError(
            f"{name_some(left)} of the source {'has' if len(left) == 1 else 'have'} no place in {family.name}, whose "
            "maps of these kinds have no biases. Set them to 0, or keep this model as RiGPT."
        )
    return {name: tensor for name, tensor in state.items() if name not in homeless}


def in_stock_order(config: RiGPTConfig, state: State, family: Family, stock_config: Any) -> State:
    """
    The weights of a RiGPT with heads in the order in which a stock class computes numbers for them.

    Raises:
        ValueError: if it has others.
    """
    elements: dict[FrameKey, torch.Tensor] = {}
    for rule, layer in family.expand(config):
        if rule.values is None:
            continue
        own, values = state[f"{rule.target}.weight"], torch.tensor(rule.values(stock_config), dtype=torch.float64)
        order = torch.empty(len(values), dtype=torch.int64)
        order[values.argsort()] = own.argsort().cpu()
        difference = own.to(torch.float64).cpu()[order] - values
        if difference.norm() > ROUNDING[own.dtype] * values.norm():
            raise ValueError(
                f"`{rule.target}.weight` has no counterpart in {family.name}, which computes "
                f"{', '.join(f'{value:.3g}' for value in values[:3])} and so on from the number of heads, got others. "
                "Keep this model as RiGPT."
            )
        elements[FrameKey("heads", layer)] = order[None]
    if not elements:
        return state
    transformation = GaugeTransformation(config, elements)
    return {name: transformation.transform(name, tensor, state.__getitem__) for name, tensor in state.items()}
