"""A model as the searches of this folder take it: a configuration, and parameters that are read one by one."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoints.opened import OpenedModel, open_model
from ..checkpoints.weights import check_finite
from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM


@dataclass(frozen=True)
class Given:
    """
    A RiGPT whose weights need not be in memory.

    Args:
        config (`RiGPTConfig`): its configuration.
        shapes (`dict`): of its parameters by name, tied ones once.
        read (`Callable`): gives a parameter, detached.
        name (`str`): what a person calls it; class_name (`str`): the class that it had before it was read as a RiGPT.
    """

    config: RiGPTConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    name: str
    class_name: str


def given(model: "nn.Module | OpenedModel | Given | str | os.PathLike") -> Given:
    """
    A model in memory, or one on disk or on the Hub: a folder, file or id of any model that converts.

    Raises:
        ValueError: if it is no such model, or, when they are read, weights are not finite.
    """
    if isinstance(model, Given):
        return model
    if isinstance(model, nn.Module):
        return _in_memory(model)
    opened = model if isinstance(model, OpenedModel) else open_model(os.fspath(model))
    name = opened.stock or RiGPTForCausalLM.__name__
    return Given(opened.config, opened.weights.shapes, opened.weights.read, opened.name, name)


def _in_memory(model: Any) -> Given:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(name: str) -> torch.Tensor:
        check_finite(name, weights[name], "model")
        return weights[name]

    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Given(model.config, shapes, read, getattr(model, "name_or_path", ""), type(model).__name__)
