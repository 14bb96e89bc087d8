"""A model in memory from finished tensors, the way the library loads any checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the library's own bar for loading weights, which would say nothing here."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
        model.generation_config = type(generation_config).from_dict(generation_config.to_dict())
    return model.to(like.device).train(like.training)


def load_gguf(folder: Path, gguf_file: str, dtype: torch.dtype) -> Any:
    """A stock model from a GGUF file, its weights decoded to `dtype`."""
    options = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always decode
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype, **options)
