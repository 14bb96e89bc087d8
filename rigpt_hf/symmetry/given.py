"""A model as the searches of this folder take it: in memory or not, its parameters are read one by one."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checkpoints.opened import MadeWeights, OpenedModel, open_model
from ..checkpoints.write import Entry


Model = nn.Module | OpenedModel | str | os.PathLike


def given(model: Model) -> OpenedModel:
    """
    A RiGPT in memory, or a model on disk or on the Hub: a folder, file or id of any that converts.

    Raises:
        ValueError: if it is no such model.
    """
    if isinstance(model, OpenedModel):
        return model
    return _in_memory(model) if isinstance(model, nn.Module) else open_model(model)


def _in_memory(model: Any) -> OpenedModel:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def making(name: str) -> Callable[[torch.dtype], torch.Tensor]:
        return lambda dtype: weights[name].to("cpu", dtype)

    entries = [Entry(name, tuple(weight.shape), making(name)) for name, weight in weights.items()]
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return OpenedModel(name, model.config, MadeWeights(entries, dtypes, "model"), None, (), model.dtype)
