"""Stock models opened as RiGPTs, for the room of checkpoints below: each tensor is folded when it is asked for."""

import torch

from ..checkpoints.opened import MadeWeights, OpenedModel, Stored
from ..checkpoints.read import check_sizes
from .families import architecture_of
from .files import read_file
from .plan import make_plan


__all__ = ["as_rigpt", "read_file"]


def as_rigpt(stored: Stored) -> OpenedModel:
    """
    A stock model as the RiGPT that computes the same function.

    What is computed is made in float32 at least: products of weights of 16 bits are no numbers of 16 bits. What is
    taken over as it stands keeps its dtype.

    Raises:
        ValueError: if its class, an option or a tensor has no exact counterpart; the message names it.
    """
    architecture = architecture_of(stored.config)  # refuses a class before its weights are looked at
    weights = stored.weights()
    if not stored.is_whole:
        check_sizes(stored.config, weights.shapes, stored.argument, stored.name)
    plan = make_plan(architecture, stored.config, weights)
    computed = torch.promote_types(plan.source_dtype, torch.float32)
    dtypes = {entry.name: entry.kept or computed for entry in plan.entries}
    made = MadeWeights(plan.entries, dtypes, stored.name)
    return OpenedModel(
        stored.name, plan.config, made, architecture.class_name, stored.notes, plan.source_dtype, stored
    )
