"""A model in memory from finished tensors, the way the library loads any checkpoint."""

import copy
from typing import Any

import torch

from ..checkpoints.read import quiet_loading


def assemble(
    model_class: Any, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, like: Any, backend: str
) -> Any:
    """
    A model from its tensors, as a counterpart of another one.

    Going through `from_pretrained` ties weights and fills buffers as loading from disk would.

    Args:
        model_class, config: of the new model.
        tensors (`dict[str, torch.Tensor]`): every weight that is not tied to another.
        dtype (`torch.dtype`): of the new model.
        like (`PreTrainedModel`): whose device, mode and generation config it takes over.
        backend (`str`): its attention implementation.
    """
    with quiet_loading():
        model = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, attn_implementation=backend
        )
    generation_config = getattr(like, "generation_config", None)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)  # which keeps that it was loaded as it is
    return model.to(like.device).train(like.training)
