"""
Documents from a row of token ids: `python -m evaluation.experiments.decoded --help`.

What a model was trained and validated on is often there as token ids only. As text it can be given to any model:
bits per byte, and questions made of words, need it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rigpt_hf.checkpoints.folder import write_text
from rigpt_hf.text.tokenizer import load_tokenizer

from .command import command


@dataclass(frozen=True)
class Options:
    """The fields are the options of the command."""

    tokens: Annotated[Path, typer.Option(help="File of little-endian uint16 token ids.")]
    tokenizer: Annotated[str, typer.Option(help="Folder, tokenizer.json or Hub id of the tokenizer that made them.")]
    output: Annotated[Path, typer.Option(help="JSONL file to write, a document a line.")]
    window: Annotated[int, typer.Option(help="Token ids in a document.")] = 512
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier file.", show_default="no")] = False

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"`window` must be at least 1, got {self.window}.")
        if not self.tokens.is_file():
            raise ValueError(f"`tokens` must be a file of token ids, got {str(self.tokens)!r}, which is none.")
        if self.output.exists() and not self.force:
            raise ValueError(f"`output` must not exist yet, got {str(self.output)!r}. Name another or pass --force.")


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
    """Decode and write; `{"text": ...}` a line."""
    tokens = np.memmap(options.tokens, dtype="<u2", mode="r")
    found = documents(tokens, load_tokenizer(options.tokenizer), options.window)
    write_text(options.output, "".join(json.dumps({"text": each}) + "\n" for each in found))
    Console().print(f"{len(found)} documents, {sum(map(len, found)):,} characters in {options.output}")


@command(Options, run)
def main() -> None:
    """
    Make documents of a row of token ids, to measure any model on them.

        python -m evaluation.experiments.decoded --tokens val.bin --tokenizer my-model --output held-out.jsonl

        rigpt evaluate my-model --against another --suite full --text held-out.jsonl
    """


if __name__ == "__main__":
    typer.run(main)
