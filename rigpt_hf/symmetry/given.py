"""A model as the searches of this folder take it: in memory or not, its parameters are read one by one."""

import os
from typing import TypeAlias

from torch import nn

from ..checkpoints.opened import OpenedModel, in_memory, open_model


Model: TypeAlias = nn.Module | OpenedModel | str | os.PathLike


def given(model: Model) -> OpenedModel:
    """
    A RiGPT in memory, or a model on disk or on the Hub: a folder, file or id of any that converts.

    Raises:
        ValueError: if it is no such model.
    """
    if isinstance(model, OpenedModel):
        return model
    if isinstance(model, nn.Module):
        return in_memory(model, getattr(model, "name_or_path", "") or type(model).__name__)
    return open_model(model)
