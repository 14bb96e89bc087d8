"""Text to calibrate on, and other text to say on what was lost."""

from pathlib import Path
from typing import Literal

import torch

from ..checkpoints.logits import longest_of
from ..checkpoints.opened import Stored
from ..text.corpus import gather_documentation
from ..text.tokenizer import ids_of, text_row


# The documentation of the installed packages, which needs no network.
DEFAULT = "default"
# Tokens of a window at most.
CONTEXT = 512
# Bytes of documentation for a token, which no tokenizer reaches.
BYTES_PER_TOKEN = 8


def calibration_text(source: Stored, calibrate: str, windows: int, judges: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Windows `[windows, S]` to calibrate on and `[judges, S]` to judge on, which hold no text of the former.

    Args:
        source (`Stored`): whose tokenizer it is.
        calibrate (`str`): a file of text, the end of which judges; or `"default"`, documentation of the installed
            packages, of which those passages judge that [`gather_documentation`] holds out.
        windows, judges (`int`): how many of each.

    Raises:
        ValueError: if there is no tokenizer, or too little text.
    """
    context = min(CONTEXT, longest_of(source.config))
    count = (windows + judges) * context
    if calibrate != DEFAULT:
        return _split(text_row(source, Path(calibrate), count, "calibrate"), windows, judges, context)
    calibration = _documentation(source, "training", windows, context)
    return calibration, _documentation(source, "held-out", judges, context)


def _documentation(source: Stored, part: Literal["training", "held-out"], count: int, context: int) -> torch.Tensor:
    """Windows of a part of the documentation of the installed packages, at most `count`."""
    text = "\n\n".join(gather_documentation(BYTES_PER_TOKEN * count * context, part=part))
    row = ids_of(text, source.tokenizer(), source.config, source.name, count * context, "calibrate")
    return row[: len(row) // context * context].view(-1, context)


def _split(row: torch.Tensor, windows: int, judges: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The beginning of a row of tokens as windows to calibrate on, and its end as windows to judge on."""
    whole = row[: len(row) // context * context].view(-1, context)
    judging = max(1, min(judges, len(whole) * judges // (windows + judges)))
    if len(whole) < 2:
        raise ValueError(
            f"`calibrate` must hold at least two windows of {context} tokens, of which one judges, got {len(row)} "
            "tokens. Give a longer text."
        )
    return whole[:-judging], whole[-judging:]
