"""Text to calibrate on and other text to judge on, as windows of tokens."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..text.corpus import gather_documentation
from ..text.sources import DOCUMENTATION, documents


# Moments of fewer tokens know too little of the widest matrices.
TOKENS, CONTEXT = 32768, 512
# Characters that are read for a token that is wanted.
CHARACTERS = 8
BETWEEN = "\n\n"


def calibration_tokens(
    tokenizer: Any, source: str | os.PathLike = DOCUMENTATION, *, tokens: int = TOKENS, context: int = CONTEXT
) -> torch.Tensor:
    """
    Windows `[N, context]` of text to calibrate on.

    Args:
        tokenizer: The model's own.
        source (`str` or `os.PathLike`): As of [`documents`]: `"docs"`, the documentation of installed packages but for
            the eighth that suites judge on, or a file, folder or data set.
        tokens (`int`): How many in all, at most.
        context (`int`): In a window; at most as many as the model can read.

    Raises:
        ValueError: if there is too little text for one window, or none.
    """
    return windows(tokenizer, documents(source, megabytes=CHARACTERS * tokens / 1e6), tokens, context, str(source))


def held_out_tokens(tokenizer: Any, *, tokens: int = 8192, context: int = CONTEXT) -> torch.Tensor:
    """Windows `[N, context]` of the documentation that [`calibration_tokens`] leaves out, to judge on."""
    texts = gather_documentation(CHARACTERS * tokens, part="held-out")
    return windows(tokenizer, texts, tokens, context, "the documentation held out")


def random_tokens(vocab_size: int, *, tokens: int = TOKENS, context: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    """Windows `[N, context]` of tokens that are drawn alike and alone: what a model sees where there is no text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (max(1, tokens // context), context), generator=generator)


def windows(tokenizer: Any, texts: Iterable[str], tokens: int, context: int, name: str) -> torch.Tensor:
    """
    The first tokens of texts in windows `[N, context]`, as many as there are full ones, at most `tokens / context`.

    Raises:
        ValueError: if there is no full window.
    """
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= CHARACTERS * tokens:
            break
    ids = tokenizer(BETWEEN.join(parts), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    count = min(len(ids), max(tokens, context)) // context
    if count == 0:
        raise ValueError(
            f"`calibration` must hold at least one window of {context} tokens, got {len(ids)} in {name}. Give a "
            "longer text."
        )
    return ids[: count * context].reshape(count, context)


@torch.no_grad()
def window_losses(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    """Nats per token of each window `[N, S]`, to be compared window by window."""
    device = next(model.parameters()).device
    return [float(model(input_ids=row, labels=row, use_cache=False).loss) for row in tokens.to(device).split(1)]
