"""Adapters of PEFT on disk."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from ..extras import require
from .read import quiet_loading, reading
from .source import ADAPTER, read_json
from .written import file_sha256


logger = logging.getLogger(__name__)

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


def warn_of_other_base(folder: Path, model: str):
    """
    Say so where an adapter was made on other weights than those of a model.

    Its tensors fit every model of that shape, and do little in the frames of another.

    Args:
        folder (`Path`): Of the adapter, which names its model.
        model (`str`): The model that it is used with, as a person named it.
    """
    base = read_json(folder / ADAPTER, "adapter").get("base_model_name_or_path")
    if not isinstance(base, str) or not base or os.path.realpath(base) == os.path.realpath(model):
        return
    said = f"The adapter {str(folder)!r} was made on {base!r}"
    held = [{path.name: path for path in Path(name).glob("*.safetensors")} for name in (base, model)]
    if not all(held):
        logger.warning(f"{said}. Whether {model!r} has the same weights was not seen.")
    elif held[0].keys() != held[1].keys() or any(
        file_sha256(path) != file_sha256(held[1][name]) for name, path in held[0].items()
    ):
        logger.warning(
            f"{said}, whose weights are not those of {model!r}: it does little in the frames of another model. `rigpt "
            f"transport {folder} OUTPUT --from {base} --to {model}` carries it there."
        )
