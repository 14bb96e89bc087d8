"""An average of the weights along the way, which learns what the last steps have in common and forgets their noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


# In an optimizer's state, where checkpoints and FSDP2 keep it beside the moments.
AVERAGE = "average"


class WeightAverage:
    """
    An exponential moving average of a model's weights: linear, so it turns along with whatever the weights turn with.

    Args:
        model, optimizer: Those of a run, prepared.
        decay (`float` or `None`): What is kept in a step, less in the first ones; `None` does nothing at all.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float | None):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model, self.optimizer, self.decay = model, optimizer, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, counted from 1."""
        if self.decay is None:
            return
        kept = min(self.decay, step / (step + 9))
        for parameter in self.parameters:
            state = self.optimizer.state[parameter]
            # A state of nothing but an average would look begun to the optimizer.
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter.detach(), 1 - kept)
            elif state:
                state[AVERAGE] = parameter.detach().clone()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average in place of its weights."""
        pairs = [
            (parameter, self.optimizer.state[parameter][AVERAGE])
            for parameter in self.parameters
            if self.decay is not None and AVERAGE in self.optimizer.state.get(parameter, {})
        ]
        self._exchange(pairs)
        try:
            yield
        finally:
            self._exchange(pairs)

    def _exchange(self, pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        exchange(pairs)
        for module in self.model.modules() if pairs else ():
            # FSDP2 keeps parameters whole that an evaluation has gathered, and would go on with those.
            if hasattr(module, "reshard"):
                module.reshard()


def exchange_saved(weights: dict[str, torch.Tensor], state: dict[str, dict[str, Any]]) -> None:
    """In what was gathered inside `WeightAverage.applied`, put the weights and their average back in their places."""
    for name, entries in state.items():
        if AVERAGE in entries:
            weights[name], entries[AVERAGE] = entries[AVERAGE], weights[name]


@torch.no_grad()
def exchange(pairs: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Exchange the values of parameters and tensors, sharded alike."""
    for parameter, other in pairs:
        kept = parameter.detach().clone()
        parameter.copy_(other)
        other.copy_(kept)
