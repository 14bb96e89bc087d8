"""
Noether's theorem for weights: every continuous gauge symmetry pairs to zero with the gradient, and every one whose
generator is symmetric (stretches, not rotations) conserves a quadratic charge under gradient flow.

If `L(exp(tX) θ) = L(θ)` then `<∇L, Xθ> = 0` (Noether 1918, for a parameter redundancy; Hashimoto, Hirono and Sannai,
arXiv 2402.02362). For `X = Xᵀ` this is the time derivative of `-θᵀXθ/2` along `dθ/dt = -∇L`, which therefore stays.
With a rate μ of weight decay, `dθ/dt = -∇L - μθ`, it dies as `exp(-2μt)`; under gradient descent with step η it
changes by exactly `η² ∇Lᵀ X ∇L` per step, hence by O(η) over a fixed time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import FrameKey, layer_of, refuse_shared_frames, table_of
from ..status import doing
from .contraction import Weights, views, weights_of


class Pairing(NamedTuple):
    """
    The pairing of the gradient with all generators of one frame.

    Args:
        value (`torch.Tensor`): in the Lie algebra: `[copies, n, n]` for matrices (antisymmetric where the group is
            orthogonal), `[1, 2, F]` for scalings of neurons, `[copies, n]` for translations. Zero by Noether.
        relative (`float`): its norm divided by `Σ |∇W| |W|` over the parameters that carry the frame; for
            translations by the norm of the whole gradient.
    """

    value: torch.Tensor
    relative: float


def gradient_pairing(model: nn.Module, loss: torch.Tensor | Callable[[nn.Module], torch.Tensor]) -> dict[str, Pairing]:
    """
    The pairing of the gradient with every generator of the gauge group: zero up to rounding, for every loss that
    depends on the weights through the logits only.

    Args:
        model: A RiGPT, with gradients enabled.
        loss: A scalar computed from it, or a function that computes one.

    Returns:
        One [`Pairing`] per frame that has generators; for the stream one antisymmetric d×d matrix.

    Raises:
        ValueError: if `loss` is no scalar that depends on the model's parameters.
    """
    value = loss if isinstance(loss, torch.Tensor) else loss(model)
    if value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"`loss` must be a scalar computed from the model with gradients enabled, got shape {tuple(value.shape)} "
            f"and requires_grad={value.requires_grad}."
        )
    parameters = dict(model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"`model` must have no frozen parameters, as all of them move along with a symmetry, got {frozen[0]!r}. "
            "Take `copy.deepcopy(model).requires_grad_(True)`."
        )
    gradients = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
    gradient = {name: g.detach().to("cpu", torch.float64) for name, g in zip(parameters, gradients, strict=True)}
    weights, table = weights_of(model), table_of(model.config)
    pairings = {}
    for view in views(table, gradient, weights, [key for key, frame in table.frames.items() if frame.group.dimension]):
        scale = sum(float(gradient[name].norm() * weights[name].norm()) for name, _ in view.walk(view.key))
        pairing = view.group.generator(view.grams)
        pairings[str(view.key)] = Pairing(pairing, float(pairing.norm()) / max(scale, 1e-300))
    norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
    for key in table.shifts:
        pairing = translation_pairing(model.config, key, gradient, weights)
        pairings[str(key)] = Pairing(pairing, float(pairing.norm()) / max(norm, 1e-300))
    return pairings


def translation_pairing(config: RiGPTConfig, key: FrameKey, gradient: Weights, weights: Weights) -> torch.Tensor:
    """The derivative of `<∇L, motion>` by the translation's vector, to which the motion is linear."""
    table = table_of(config)
    frame, shift = table.frames[key], table.shifts[key]
    if key.layer is None and layer_of(shift.like) is not None:
        refuse_shared_frames(config, "The pairing with translations of heads")
    vector = torch.zeros(frame.group.shape(frame.copies), dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for name, move in shift.moves.items():
        total = total + (gradient[name] * move(vector.flatten(), weights.__getitem__)).sum()
    (pairing,) = torch.autograd.grad(total, vector)
    return frame.group.project(pairing)


@doing("Computing charges")
def charges(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The quantities that gradient flow conserves, by frame: one per generator that is a symmetric matrix.

    - GL frames: `Σ W Wᵀ` over vectors minus over covectors, `[copies, n, n]`; for values and o_proj `v vᵀ - oᵀ o`, for
      queries and keys `q qᵀ - k kᵀ` (of each plane the trace alone, where positions are rotary; with squared distances
      `|q|² - |k|² + 2 λ²`), for tokens `EᵀE - UᵀU - G Gᵀ - b bᵀ`.
    - Scalings of neurons, `[1, 2, F]`: `|w|² - p |d|²` for an activation of degree p, `|u|² - |d|²` for a linear
      factor.
    - Translations by constant vectors, `[copies, n]`: biases of keys where the softmax does not see them, which do not
      move at all, and the sum of all token vectors minus that of all positions (untied head, no projections).

    Rotations have no charge of this kind: their generators are antisymmetric. The quadratic charges vanish exactly on
    the representatives of least norm, of which [`canonicalize`] chooses one and to which weight decay drives. Sources:
    the head of this file.
    """
    config, weights, table = model.config, weights_of(model), table_of(model.config)
    stretching = [key for key, frame in table.frames.items() if frame.group.stretches]
    result = {str(view.key): view.group.generator(view.grams) for view in views(table, weights, weights, stretching)}
    # Where other weights say how far to move, nothing is conserved.
    for key, shift in table.shifts.items():
        if shift.constant:
            result[str(key)] = translation_pairing(config, key, weights, weights)
    return result
