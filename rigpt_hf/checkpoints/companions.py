"""Files beside the weights: configuration and code, generation config, tokenizer, chat template."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .read import load_tokenizer
from .source import OTHER_VOCABULARIES, TEMPLATE_FILES, TOKENIZER_FILES, VOCABULARY_FILES


logger = logging.get_logger(__name__)


def save_config(config: PreTrainedConfig, model_class: Any, folder: Path, dtype: torch.dtype) -> None:
    """`config.json`, and the modeling code beside it if it is ours, as `save_pretrained` of the model would do."""
    config.architectures = [model_class.__name__]
    config.dtype = dtype
    if model_class.is_remote_code():
        with torch.device("meta"):
            custom_object_save(model_class(config), folder, config=config)
    config.save_pretrained(folder)


def save_generation_config(source: Path, folder: Path, config: PreTrainedConfig) -> None:
    """The source's generation config, or the one that follows from the configuration."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def save_tokenizer(source: Path, folder: Path, **kwargs) -> None:
    """
    The source's tokenizer and chat template.

    A tokenizer that loads is saved anew, which names its class: a folder without that name is otherwise resolved by
    `model_type`. One that does not load (say for want of an optional library) is copied file by file.

    Args:
        source, folder (`Path`): from where to where.
        kwargs: passed to `AutoTokenizer.from_pretrained`.
    """
    if kwargs or any((source / name).is_file() for name in VOCABULARY_FILES):
        try:
            tokenizer = load_tokenizer(source, **kwargs)
        except ValueError as error:
            logger.warning(f"The tokenizer of {source} did not load ({error}); its files are copied as they are.")
            _copy(source, folder, TOKENIZER_FILES)
        else:
            tokenizer.save_pretrained(folder)
    elif left := sorted(path.name for pattern in OTHER_VOCABULARIES for path in source.glob(pattern)):
        logger.warning(
            f"The tokenizer of {source} did not come along: {', '.join(left)} must first be made a `tokenizer.json`."
        )
    if (templates := source / "additional_chat_templates").is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
    _copy(source, folder, TEMPLATE_FILES)


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
