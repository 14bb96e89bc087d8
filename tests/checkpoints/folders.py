"""The ways to write a checkpoint, each with a source, and what tests look at in folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rigpt_hf import RiGPTConfig
from rigpt_hf.conversion import convert_checkpoint, convert_model
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.checkpoint import transform_checkpoint

from ..conversion.sources import stock_model
from ..models import tiny_model


def transformation(config: RiGPTConfig, frames="all", seed: int = 0) -> GaugeTransformation:
    return GaugeTransformation.random(config, torch.Generator().manual_seed(seed), frames)


def _transform(source: Path, output: Path, **options) -> Any:
    g = transformation(RiGPTConfig.from_pretrained(source), ("stream", "head"))
    return transform_checkpoint(source, output, g, progress=False, **options)


class Verb(NamedTuple):
    """A function from folder to folder, a model to give it, and what this becomes in memory."""

    model: Callable[[torch.dtype], Any]
    run: Callable[..., Any]
    result: Callable[[Any], Any]


VERBS = {
    "convert": Verb(
        lambda dtype: stock_model("gpt2", dtype),
        lambda source, output, **options: convert_checkpoint(source, output, progress=False, **options),
        convert_model,
    ),
    "transform": Verb(
        lambda dtype: tiny_model(dtype=dtype),
        _transform,
        lambda model: transformation(model.config, ("stream", "head"))(model),
    ),
}


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def save_tokenizer(folder: Path) -> None:
    """Four words, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
