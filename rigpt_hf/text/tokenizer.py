"""Tokenizers that are fast, have an end-of-text token and are recognised by a fingerprint; and one made here."""

import hashlib
import itertools
import os
import re
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..checkpoints.logits import longest_of
from ..checkpoints.opened import Stored
from ..checkpoints.read import load_tokenizer as load
from ..checkpoints.read import reading
from ..status import doing
from .corpus import gather_documentation
from .files import local_documents


END = "<|endoftext|>"
LONG_WORD = re.compile(r"\S{1000}|\s{1000}")
# Packages of the standard library whose documentation is found in no time.
QUICK_ROOTS = [Path(sysconfig.get_path("stdlib")) / name for name in ("asyncio", "email", "json", "unittest")]
LARGEST = 2**20  # tokens of a tokenizer that is made here
HELD_OUT = 0.02  # share of the tokens that training never sees
MOST = 512  # tokens of a text on which models are compared


def load_tokenizer(
    tokenizer: str | os.PathLike | PreTrainedTokenizerFast, revision: str | None = None
) -> PreTrainedTokenizerFast:
    """
    A fast tokenizer from a folder, a Hub id or a tokenizer.json; one that is loaded already is handed through.

    Args:
        tokenizer: The tokenizer, or where it is.
        revision: Branch, tag or commit on the Hub; not looked at elsewhere.

    Raises:
        ValueError: if it does not load or is not fast.
    """
    if isinstance(tokenizer, str | os.PathLike):
        name = os.fspath(tokenizer)
        if Path(name).is_file():
            with reading("tokenizer", name, "be a tokenizer.json, or a folder or Hub id with a tokenizer"):
                loaded = PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            loaded = load(name, argument="tokenizer", revision=None if Path(name).is_dir() else revision)
    else:
        loaded = tokenizer
    if not loaded.is_fast:
        raise ValueError(
            f"`tokenizer` must be a fast one, got {type(loaded).__name__}. Convert it to a tokenizer.json first."
        )
    return loaded


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """
    The id of the token that ends a document.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`tokenizer` must have an end-of-text token, got {tokenizer.name_or_path or 'one'!r} without. Set its "
            "`eos_token` first."
        )
    return tokenizer.eos_token_id


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id, added tokens included; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the serialised backend, less its padding and truncation, which are state of its last use."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added; names of special tokens in the text are ordinary text."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


@doing("Training a tokenizer")
def train_tokenizer(passages: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end-of-text token; of at most `LARGEST` tokens."""
    if vocabulary > LARGEST:  # the library makes room for all of them first
        raise ValueError(f"`vocabulary` must be at most {LARGEST:,}, got {vocabulary}. Take fewer tokens.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # which goes to standard output
    )
    tokenizer.train_from_iterator(map(_cut, passages), trainer, length=len(passages))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, padding_side="left"
    )


def _cut(passage: str) -> list[str]:
    """A passage in parts none of which is one word of great length: each merge costs the trainer such a word anew."""
    cuts = [0, *(match.end() for match in LONG_WORD.finditer(passage)), len(passage)]
    return [passage[start:end] for start, end in itertools.pairwise(cuts)]


def token_row(tokenizer: PreTrainedTokenizerFast, passages: list[str]) -> torch.Tensor:
    """All passages as one row of token ids, an end-of-text token after each."""
    encoded = tokenizer(passages, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def split(tokens: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Tokens to train on and tokens held out, at least four windows of them.

    Raises:
        ValueError: if there are too few tokens for both.
    """
    held_out = max(int(HELD_OUT * len(tokens)), 4 * context)
    if len(tokens) < 2 * held_out:
        raise ValueError(
            f"`text` must hold at least {8 * context} tokens to train on, got {len(tokens)}. Give a longer text."
        )
    return tokens[:-held_out], tokens[-held_out:]


def text_ids(source: Stored, path: Path) -> torch.Tensor:
    """Token ids `[1, seq]` of the beginning of a file of text, by the tokenizer of a model."""
    return text_row(source, path, min(MOST, longest_of(source.config)))[None]


def text_row(source: Stored, path: Path, length: int) -> torch.Tensor:
    """At most `length` token ids of the beginning of a file of text, by the tokenizer of a model."""
    text = "\n\n".join(itertools.islice(local_documents(path, argument="text"), max(MOST, length)))
    try:
        tokenizer = source.tokenizer()
    except ValueError as error:
        raise ValueError(
            f"`text` needs a tokenizer, and {source.name!r} has none that loads here: {error} Add the tokenizer's "
            "files to the folder, or leave the text out."
        ) from error
    return ids_of(text, tokenizer, source.config, source.name, length)


def documentation_ids(*models: Stored) -> torch.Tensor | None:
    """
    Token ids `[1, seq]` of documentation of Python, which every machine has, by the first tokenizer among those of
    some models that loads and gives tokens that all of them have; `None` if there is none.
    """
    for model in models:
        with suppress(ValueError):
            text = "\n\n".join(gather_documentation(16 * MOST, roots=QUICK_ROOTS))
            tokenizer = model.tokenizer()
            config = min((model.config for model in models), key=longest_of)
            input_ids = ids_of(text, tokenizer, config, model.name, min(MOST, longest_of(config)))
            if int(input_ids.max()) < min(model.config.vocab_size for model in models):
                return input_ids[None]
    return None


def ids_of(text: str, tokenizer: Any, config: Any, source: str, length: int) -> torch.Tensor:
    """At most `length` token ids of the beginning of a text, which a model of this configuration has."""
    encoded = tokenizer(text[: 16 * length], return_tensors="pt", add_special_tokens=False)["input_ids"]
    input_ids = encoded[0, :length]
    if len(input_ids) < 2:
        raise ValueError(
            f"`text` must give at least two tokens by the tokenizer of {source!r}, got {len(input_ids)}. Give a "
            "longer one, add the tokenizer's files to the folder, or leave it out to compare on random tokens."
        )
    if (largest := int(input_ids.max())) >= config.vocab_size:
        raise ValueError(
            f"`text` must give tokens that the model has an embedding for, ids from 0 to {config.vocab_size - 1}, got "
            f"{largest} by the tokenizer of {source!r}. Put the model's own tokenizer into the folder, or leave the "
            "text out."
        )
    return input_ids
