"""
Documents from a row of token ids: `python -m evaluation.experiments.decoded --help`.

The text that a model was trained and validated on is often there as token ids only. As text any model can read it:
bits per byte, and questions made of words, need it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from transformers import PreTrainedTokenizerBase

from rigpt_hf.checkpoints.folder import check_file, write_text
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.terminal import Console
from rigpt_hf.text.tokenizer import load_tokenizer

from .common import check_least


@dataclass(frozen=True)
class Options:
    """The tokens, and how they are decoded."""

    tokens: Annotated[Path, READS]
    """File of little-endian uint16 token ids."""
    tokenizer: Annotated[str, READS]
    """Folder, tokenizer.json or Hub id of the tokenizer that made them."""
    output: Annotated[Path, WRITES]
    """JSONL file to write, a document a line."""
    window: int = 512
    """Token ids in a document."""
    force: bool = False
    """Replace a file that this program wrote and nobody changed."""

    def __post_init__(self):
        check_least(self, window=1)
        if not self.tokens.is_file():
            raise ValueError(f"`tokens` must be a file of token ids, got {str(self.tokens)!r}, which is none.")


def documents(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, window: int) -> list[str]:
    """
    The text of every `window` token ids, one after the other; what is left at the end makes none.

    Args:
        tokens: `[N]`.

    Raises:
        ValueError: if there are fewer than `window`, or the tokenizer has no such ids.
    """
    if len(tokens) < window:
        raise ValueError(f"`tokens` must be at least one window of {window}, got {len(tokens)}. Take a shorter one.")
    if (largest := int(tokens.max())) >= len(tokenizer):
        raise ValueError(
            f"`tokenizer` must have made the ids, got {len(tokenizer)} tokens and the id {largest}. Name another."
        )
    rows = tokens[: len(tokens) // window * window].reshape(-1, window)
    return [tokenizer.decode(row.tolist()) for row in rows]


def run(options: Options) -> None:
    """
    Make documents of a row of token ids, to measure any model on them; `{"text": ...}` a line.

        python -m evaluation.experiments.decoded val.bin my-model held-out.jsonl

        rigpt evaluate my-model --against another --suite full --text held-out.jsonl
    """
    seen = check_file(options.output, "output", options.force)
    tokens = np.memmap(options.tokens, dtype="<u2", mode="r")
    texts = documents(tokens, load_tokenizer(options.tokenizer), options.window)
    write_text(options.output, "".join(json.dumps({"text": text}) + "\n" for text in texts), seen=seen, named=True)
    Console().print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters in {options.output}")


main = program(Options, run, name="python -m evaluation.experiments.decoded")

if __name__ == "__main__":
    sys.exit(main())
