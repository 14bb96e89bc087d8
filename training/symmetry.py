"""The symmetry of tokens that a run keeps, read from a file for the run's vocabulary."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rigpt_hf.checkpoints.read import load_config
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry
from rigpt_hf.symmetry.tokens.symmetry import behind_a_space
from rigpt_hf.symmetry.tokens.training import recorded
from rigpt_hf.text.tokenizer import vocabulary_size


def read_symmetry(
    path: str | None, config: Any, tokenizer: Any, vocab_size: int | None = None, end_of_text: int | None = None
) -> TokenSymmetry | None:
    """
    The symmetry in a file, for tokens that a model and its data have; `None` without a file.

    Args:
        path: What `TokenSymmetry.save` wrote; tokens may be strings if there is a tokenizer.
        config: Of the model.
        tokenizer: Of the data; without one `vocab_size` and `end_of_text` say what must be known of it.

    Raises:
        ValueError: if it is something else, moves special tokens or none at all, or is of another vocabulary.
    """
    if path is None:
        return None
    special = [end_of_text] if tokenizer is None else tokenizer.all_special_ids
    symmetry = TokenSymmetry.load(path, [token for token in special if token is not None], tokenizer)
    if not len(symmetry.points):
        raise ValueError(f"`symmetry` must exchange some tokens, got {path!r}, which exchanges none. Leave it out.")
    least = vocabulary_size(tokenizer) if vocab_size is None else vocab_size
    if not least <= symmetry.vocab_size <= config.vocab_size:
        sizes = f"{least}" if least == config.vocab_size else f"{least} to {config.vocab_size}"
        raise ValueError(
            f"`symmetry` must be of the vocabulary in use, {sizes} tokens, got {path!r} of {symmetry.vocab_size}. "
            "Make it with the same tokenizer."
        )
    return symmetry


def absent_in_words(symmetry: TokenSymmetry, ids: np.ndarray, tokenizer: Any) -> str | None:
    """A sentence on tokens that a symmetry moves and that are not among `ids`, the first of the data, if any are."""
    there = set(np.unique(ids).tolist())
    absent = [int(token) for token in symmetry.points if int(token) not in there]
    if not absent:
        return None
    moved = len(symmetry.points)
    said = f"of the {moved} tokens that it moves, {len(absent)} do not occur in the first {ids.size:,} tokens"
    if tokenizer is None:
        return f"`symmetry` has tokens that the data lack: {said}."
    words = [tokenizer.decode([token]) for token in absent]
    behind = [f" {word}" for word in words if behind_a_space(word, tokenizer) in there]
    hint = (
        f" {behind[0]!r}, the word behind a space, is another token and occurs: is that one meant?" if behind else ""
    )
    return f"`symmetry` has tokens that the data lack: {said}, such as {words[0]!r}.{hint}"


def kept_in_words(distance: float) -> str:
    """A sentence on whether weights keep their symmetry, by their distance from it as a share of their norm."""
    most = Representation.tolerance(torch.float32)
    word = "kept" if distance <= most else "left"
    return (
        f"The weights have {word} the symmetry: their distance from it is {distance:.1e} of their norm, and up to "
        f"{most:.0e} is rounding."
    )


def resumed(options: Any, model: Any, symmetry: TokenSymmetry | None, checkpoint: Path | None) -> None:
    """
    Give a model the record of a checkpoint: irreducible representations are found numerically, and could be others on
    another machine. Nothing is done without a symmetry or a checkpoint.

    Raises:
        ValueError: if it is another symmetry than the one of the options.
    """
    if checkpoint is None or symmetry is None:
        return
    saved = load_config(checkpoint)
    if (known := recorded(saved)) is None or known.symmetry != symmetry:
        raise ValueError(
            f"`symmetry` must be as in the interrupted run, got another one in {options.symmetry!r}. Give the same, "
            "or `force=True` instead of `--resume` to begin anew."
        )
    model.config.token_symmetry = saved.token_symmetry
