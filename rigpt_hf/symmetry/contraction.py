"""
One bilinear map behind everything that is measured in a frame: `Σ a bᵀ` over all parameters that carry it.

With weights twice it gives Gram matrices and conserved charges, with gradients and weights the pairing with
generators, with the weights of two models the cross-covariance that alignment needs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from .frames import axes, frame_keys, key_of, row
from .groups import Role
from .permutations import Translations


Weights = Mapping[str, torch.Tensor]


def weights_of(model: nn.Module, dtype: torch.dtype | None = torch.float64) -> dict[str, torch.Tensor]:
    """
    The parameters of a model by name, tied ones once, detached, on the CPU, in `dtype` (`None`: as they are).

    Raises:
        ValueError: if one of them is not finite.
    """
    weights = {name: weight.detach().to("cpu", dtype or weight.dtype) for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"`model` must have finite weights, got NaN or infinity in {name!r}. Check its training.")
    return weights


def contract(
    config: RiGPTConfig,
    a: Weights,
    b: Weights,
    wanted: Callable[[str], bool] = lambda key: True,
) -> dict[str, dict[Role, torch.Tensor]]:
    """
    `Σ a bᵀ` for every frame, by the role in which parameters carry it.

    Args:
        config: The configuration of both.
        a, b: Tensors by parameter name, such as weights or gradients; of the same names and shapes.
        wanted: Which frames (by key, `layers.3.head_qk`) to compute; all by default.

    Returns:
        By key of the frame and role, what the frame's group makes of it: `[copies, n, n]` for groups of matrices, one
        number per head or neuron for groups of permutations.
    """
    table, keys = axes(config), frame_keys(config)
    result: dict[str, dict[Role, torch.Tensor]] = {}
    for name, tensor in a.items():
        entry, layer = row(name, table)
        for dim, axis in enumerate(entry):
            for turn in axis:
                key = key_of(turn, layer, keys)
                frame = keys[key]
                if not wanted(key):
                    continue
                first, second = (_unfold(value, dim, len(entry)) for value in (tensor, b[name]))
                assert not isinstance(frame.group, Translations), "translations turn no axis"
                part = frame.group.contract(turn.role, first, second, frame.copies)
                roles = result.setdefault(key, {})
                roles[turn.role] = roles[turn.role] + part if turn.role in roles else part
    return result


def carriers(config: RiGPTConfig, names) -> dict[str, list[str]]:
    """Which of the named parameters carry a frame, by its key."""
    table, keys = axes(config), frame_keys(config)
    result: dict[str, list[str]] = {key: [] for key in keys}
    for name in names:
        entry, layer = row(name, table)
        for turn in [turn for axis in entry for turn in axis]:
            result[key_of(turn, layer, keys)].append(name)
    return result


def _unfold(tensor: torch.Tensor, dim: int, entries: int) -> torch.Tensor:
    """The axis in question first and everything else behind it: `[length, rest]`."""
    front = tensor.flatten() if entries == 1 else tensor.movedim(dim, 0)
    return front.reshape(len(front), -1)
