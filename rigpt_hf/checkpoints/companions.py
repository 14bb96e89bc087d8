"""Files beside the weights: configuration and code, generation config, tokenizer, chat template."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .read import load_tokenizer
from .source import OTHER_VOCABULARIES, TEMPLATE_FILES, TOKENIZER_FILES, VOCABULARY_FILES, check_readable, is_inside


logger = logging.get_logger(__name__)


def save_config(config: PreTrainedConfig, model_class: Any, folder: Path, dtype: torch.dtype) -> None:
    """`config.json` as `save_pretrained` of the model would write it; a RiGPT's brings the code along."""
    config.architectures = [model_class.__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def save_generation_config(source: Path, folder: Path, config: PreTrainedConfig) -> None:
    """The source's generation config, or the one that follows from the configuration."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def plain_generation(generation: GenerationConfig | None) -> GenerationConfig:
    """One with the same special tokens, and nothing else of what a folder says of sampling, searching or outputs."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(generation, name, None) for name in names})


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
    _copy(source, folder, (*more_templates(source), *TEMPLATE_FILES))


def check_companions(source: Path) -> None:
    """A `ValueError` if a file that would come along is a link out of the folder."""
    for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, *more_templates(source)):
        if not is_inside(source / name, source, constants.HF_HUB_CACHE):
            raise ValueError(
                f"`source` must hold itself what comes along, got {str(source / name)!r}, a link out of the folder. "
                "Put the file itself there or remove it."
            )
        check_readable(source / name, "source")


def more_templates(source: Path) -> list[str]:
    """Chat templates beside the one that is taken if no name is given, by their paths in the folder."""
    return [path.relative_to(source).as_posix() for path in source.glob("additional_chat_templates/*.jinja")]


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
