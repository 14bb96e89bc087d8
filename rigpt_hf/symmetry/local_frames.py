"""
One frame of the stream per layer, and the connection between them.

With `local_frames` a layer `l` works on `x_l = Q_l x`, and the skip path carries `T_l = Q_l Q_{l-1}ᵀ` (parallel
transport) from each layer to the next, first from the stream's own frame and last back to it. In the continuum of
depth this is the connection `∂_t Q Qᵀ`, an element of so(d). A transformation `g` acts on it as on every gauge field,
`T_l -> g_l T_l g_{l-1}ᵀ`.

Depth is one dimension, in which no connection has curvature; what could be left is the holonomy of the whole way,
`T_{L+1} ··· T_1`, from the stream's frame through all layers back to it, which is 1 for transports of the form above.
Source: parallel transport as in Nakahara, "Geometry, Topology and Physics", chapters 9 and 10; a rotation per layer in
the weights of a transformer as in SliceGPT (Ashkboos et al., arXiv 2401.15024, section 3).
"""

import copy

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import FrameKey, Table, is_transport, table_of
from .action import GaugeTransformation
from .contraction import Weights, weights_of


# Largest deviation of a holonomy from the identity, in units of the dtype's rounding and per transport; and in any
# dtype, as no entry of a rotation is further than 2 from the identity's.
FLAT, FLAT_AT_MOST = 100.0, 0.05


def connection(model: nn.Module) -> torch.Tensor:
    """
    The transports along the skip path, `[L + 1, d, d]` in float64: into each layer, and from the last to the stream.

    Raises:
        ValueError: if the model has no local frames.
    """
    if not model.config.local_frames:
        raise ValueError(
            "`model` must have `local_frames=True`, got a model with one frame for all. Call `to_local_frames` first."
        )
    _check_whole(model)
    return _transports(model.config, weights_of(model))


def holonomy(model: nn.Module) -> float:
    """
    The deviation from the identity of the path through all frames and back: `max |T_{L+1} ··· T_1 - 1|`.

    Raises:
        ValueError: if the model has no local frames.
    """
    transports = connection(model)
    path = eye = torch.eye(transports.shape[-1], dtype=transports.dtype)
    for transport in transports:
        path = transport @ path
    return float((path - eye).abs().max())


def curvature(transports: torch.Tensor) -> float:
    """
    The largest deviation from the identity around a plaquette of layers and positions.

    Positions of one layer share its frame, so from one to the next a vector stays as it is, and a plaquette is to the
    next layer at one position, to the next position, back at that one, and back: `T_l(s)ᵀ T_l(s + 1) - 1`. It is zero
    for whatever transports do not depend on the position; [`holonomy`] is what tells whether they fit together.

    Args:
        transports (`torch.Tensor` of shape `[L, S, d, d]`): orthogonal, into layer `l` at position `s`; those of
            [`connection`] are the same for all positions.

    Raises:
        ValueError: if there are not four axes with at least two positions.
    """
    if transports.dim() != 4 or transports.shape[1] < 2:
        raise ValueError(
            f"`transports` must be [layers, positions >= 2, d, d], got shape {list(transports.shape)}. Expand those "
            "of `connection` over the positions."
        )
    around = transports[:, :-1].transpose(-1, -2) @ transports[:, 1:]
    return float((around - torch.eye(transports.shape[-1], dtype=transports.dtype)).abs().max())


@torch.no_grad()
def to_local_frames(model: nn.Module, rotations: torch.Tensor | None = None) -> nn.Module:
    """
    The same function with a frame of its own for every layer, as a new model.

    Args:
        model: A RiGPT, with or without local frames; it stays as it is.
        rotations (`torch.Tensor` of shape `[L, d, d]`, *optional*): the `Q_l`; identities if absent, on top of the
            frames that there are.

    Raises:
        ValueError: if `rotations` has another shape or is not orthogonal.
    """
    config = copy.deepcopy(model.config)
    _check_whole(model)
    if not config.local_frames:
        config.local_frames = True
        model = _with_config(model, config)
    if rotations is None:
        return copy.deepcopy(model)
    layers, size = config.num_hidden_layers, config.hidden_size
    rotations = rotations.to(torch.float64)
    error = None
    if rotations.shape == (layers, size, size):
        error = float((rotations @ rotations.mT - torch.eye(size).double()).abs().max())
    if error is None or not error < 1e-9:
        raise ValueError(
            f"`rotations` must be orthogonal matrices of shape [{layers}, {size}, {size}], got shape "
            f"{list(rotations.shape)}{'' if error is None else f', orthogonal to {error:.1e}'}. Draw them with `haar`."
        )
    elements = {f"layers.{index}.local": rotation[None] for index, rotation in enumerate(rotations)}
    return GaugeTransformation(config, elements)(model)


@torch.no_grad()
def to_global_frame(model: nn.Module) -> nn.Module:
    """
    The same function with one frame for all layers and no transports, as a new model.

    Raises:
        ValueError: if the transports are not flat, so that no one frame does it.
    """
    config = copy.deepcopy(model.config)
    _check_whole(model)
    if not config.local_frames:
        return copy.deepcopy(model)
    left = holonomy(model)
    allowed = min(FLAT * torch.finfo(model.dtype).eps * (config.num_hidden_layers + 1), FLAT_AT_MOST)
    if left > allowed:
        raise ValueError(
            f"`model` must have transports whose product is the identity, to {allowed:.1e} in {model.dtype}, got a "
            f"deviation of {left:.1e}. Keep the local frames, or undo the training of `transport`."
        )
    weights = weights_of(model)
    flat = flattening(config, weights).state_dict(weights)
    config.local_frames = False
    return _with_config(model, config, flat)


def flattening(config: RiGPTConfig, weights: Weights) -> GaugeTransformation:
    """The transformation of the local frames that makes every transport the identity but the last, the holonomy's."""
    if not config.local_frames:
        return GaugeTransformation.identity(config)
    path = torch.eye(config.hidden_size, dtype=torch.float64)
    elements = {}
    for index, transport in enumerate(_transports(config, weights)[:-1]):
        path = transport @ path
        # The nearest orthogonal matrix, as products of rounded rotations are not quite rotations.
        left, _, right = torch.linalg.svd(path)
        elements[f"layers.{index}.local"] = (left @ right).mT[None]
    return GaugeTransformation(config, elements)


def along(table: Table, rotation: torch.Tensor) -> dict[FrameKey, torch.Tensor]:
    """The elements that turn the stream's frame and every local one by the same `rotation` `[1, d, d]`."""
    return dict.fromkeys(table.streams, rotation)


def without_transports(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights that a common rotation of all frames turns by itself on one side only."""
    return {name: weight for name, weight in weights.items() if not is_transport(name)}


def _transports(config: RiGPTConfig, weights: Weights) -> torch.Tensor:
    return torch.stack([weights[name].to(torch.float64) for name in table_of(config).transports])


def _check_whole(model: nn.Module) -> None:
    """Raises a `ValueError` for the bare model and for adapters, whose parameters the table of frames has not."""
    for name, _ in model.named_parameters():
        table_of(model.config).turns(name)


def _with_config(model: nn.Module, config: RiGPTConfig, weights: Weights | None = None) -> nn.Module:
    """A model of the same class with another config: new transports are identities, those that are gone are left."""
    config.token_symmetry = None  # which is of the frames before
    result = type(model)(config).to(device=model.device, dtype=model.dtype).train(model.training)
    given = dict(model.named_parameters()) if weights is None else weights
    learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in result.named_parameters():
        if name in given:
            parameter.copy_(given[name])
            parameter.requires_grad_(parameter.requires_grad and learned[name])
    result.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return result
