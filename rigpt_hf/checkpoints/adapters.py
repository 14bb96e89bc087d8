"""Adapters of PEFT on disk."""

import warnings
from pathlib import Path
from typing import Any

from ..extras import require
from .read import quiet_loading, reading
from .source import ADAPTER


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def with_adapter(model: Any, folder: Path, argument: str = "adapter") -> Any:
    """
    The model with an adapter of PEFT from a folder; error messages call that `argument`.

    Raises:
        ValueError: if there is none, or it belongs to a model of other shapes or names.
    """
    require("train")
    from peft import PeftConfig, get_peft_model

    files = ADAPTER, ADAPTER_WEIGHTS
    if not all((folder / name).is_file() for name in files):
        raise ValueError(
            f"`{argument}` must be a folder with {' and '.join(files)}, got {str(folder)!r}. `rigpt finetune --lora "
            "16` makes one."
        )
    with quiet_loading(), warnings.catch_warnings(), reading(argument, folder, "belong to this model"):
        # Of what is missing the library only warns, and the model would write as if there were no adapter.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
        left = adapted.load_adapter(str(folder), "default")
        if odd := [*left.unexpected_keys, *(name for name in left.missing_keys if "lora_" in name)]:
            raise ValueError(f"{len(odd)} of its tensors have no counterpart here, {odd[0]} among them.")
        return adapted
