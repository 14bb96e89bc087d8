"""
The balanced representative: translations removed, local frames made one, stretches chosen so that every conserved
charge is zero.

On the orbit of a group of matrices the points of least norm are those where the charges vanish, and any two of them
differ by an element of the compact part only (Kempf and Ness 1979). So balancing reduces the whole gauge group to
rotations, reflections and permutations, with which lengths and angles between weights mean something.
"""

import torch

from ..configuration_rigpt import RiGPTConfig
from ..frames import FrameKey, Table, refuse_shared_frames, table_of
from .action import GaugeTransformation
from .contraction import Weights, views
from .local_frames import flattening


# Gram matrices square condition numbers; a second pass from the nearly balanced point makes up for it.
PASSES = 2


def balance(
    config: RiGPTConfig,
    weights: Weights,
    passes: int = PASSES,
    unpaired: float = 1.0,
    flat: GaugeTransformation | None = None,
) -> tuple[GaugeTransformation, dict[str, torch.Tensor]]:
    """
    The transformation that balances a model's weights, and the balanced weights in float64.

    Args:
        config: The model's configuration.
        weights: Parameters by name, as [`weights_of`] gives them; or those of some layers alone.
        passes: Number of refinements.
        unpaired: The length of what only one of two factors fills. It has no least norm, as it tends to zero; any
            length that is the same for the whole orbit will do, and a small one is near to what the slightest filling
            of the other factor would give.
        flat: What makes all local frames one, where not all transports are among `weights`.
    """
    refuse_shared_frames(config, "Balancing, on which canonical forms and alignment stand,")
    table = table_of(config)
    # Translations are read off the weights as they are, in frames of their own.
    flat = flattening(config, weights) if flat is None else flat
    total = flat @ GaugeTransformation(config, _without_translations(table, weights))
    balanced = total.state_dict({name: tensor.to(torch.float64) for name, tensor in weights.items()})
    stretching = [key for key, frame in table.frames.items() if frame.group.stretches]
    for one_pass in range(passes):
        # Short lengths cost digits, so they come last.
        length = unpaired if one_pass == passes - 1 else 1.0
        elements = {
            view.key: view.group.balance(view.grams, length) for view in views(table, balanced, balanced, stretching)
        }
        step = GaugeTransformation(config, elements)
        total, balanced = step @ total, step.state_dict(balanced)
    return total, balanced


def _without_translations(table: Table, weights: Weights) -> dict[FrameKey, torch.Tensor]:
    """Biases that nothing sees go to zero, and so does the mean of free token vectors."""
    elements = {}
    for key, shift in table.shifts.items():
        if shift.like not in weights:
            continue
        frame = table.frames[key]
        place = shift.place(weights[shift.like].to(torch.float64), frame.group.shape(frame.copies)).cpu()
        elements[key] = -frame.group.project(place)
    return elements
