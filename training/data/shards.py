"""Text tokenised once into a folder of memory-mapped shards, with a manifest that says what they are."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from rigpt_hf.checkpoints.folder import new_folder
from rigpt_hf.checkpoints.written import file_sha256
from rigpt_hf.text.sources import documents, kind_of, pinned
from rigpt_hf.text.tokenizer import encode, end_of_text_id, fingerprint, load_tokenizer, vocabulary_size

from .manifest import DTYPES, VERSION, Manifest
from .writer import ShardWriter, check_tokens_output


SPLITS = ("train", "validation")
SHARD_TOKENS = 100_000_000
CHUNK = 2**22  # tokens copied at a time
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**22  # tokenised at a time
# How a source comes to have more documents.
MORE = 'give more documents; `data_options: {separator: "\\n\\n"}` makes one of each paragraph of a text file'


def split_of(text: str, validation: float) -> str:
    """
    `"train"` or `"validation"`, decided by a hash of the text alone: neither the order of the documents nor how many
    there are matters, equal documents land together, and a larger share holds all of a smaller one.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation * 2**64 else "train"


def prepare(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerFast,
    output_dir: str | os.PathLike,
    *,
    validation: float = 0.005,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    force: bool = False,
    progress: bool = True,
    companions: Mapping[str, Any] | None = None,
    **source_options: Any,
) -> Manifest:
    """
    Tokenise a source into a folder of shards, which appears complete or not at all.

    Each document is followed by the end-of-text token. Names of special tokens inside a text are tokenised as text.
    Memory is bounded by the longest document. The tokenizer is saved in the folder too.

    Args:
        source (`str` or `os.PathLike`): As for [`documents`]; a data set on the Hub is pinned to its present commit.
        tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerFast`): Folder, Hub id, tokenizer.json, or loaded.
        output_dir (`str` or `os.PathLike`): Folder to make.
        validation (`float`, defaults to 0.005): Share of the documents held out, by [`split_of`]; 0 for none.
        shard_tokens (`int`, defaults to 100,000,000): Tokens in a file; the last one of a split has fewer.
        max_tokens (`int`, *optional*): Tokens of both splits together; the document that reaches it is cut there.
        force (`bool`, defaults to `False`): Replace an earlier folder of tokens once the new one is complete.
        progress (`bool`, defaults to `True`): Show a progress bar.
        companions (`Mapping[str, Any]`, *optional*): What else is written beside the manifest, as JSON by file name.
        source_options: Of [`documents`].

    Returns:
        [`Manifest`].

    Raises:
        ValueError: if an argument is impossible, the source is missing or holds no text, one of the two splits would
            be empty, the tokenizer is slow or has no end-of-text token, or the output may not be written.
    """
    source = os.fspath(source)
    if not 0 <= validation < 1:
        raise ValueError(f"`validation` must be at least 0 and less than 1, got {validation}.")
    for argument, value in (("shard_tokens", shard_tokens), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    output = Path(output_dir)
    seen = check_tokens_output(output, [Path(source)] if kind_of(source) == "local" else [], force)
    tokenizer = load_tokenizer(tokenizer)
    end = end_of_text_id(tokenizer)
    revision = pinned(source, source_options.get("revision"))
    if revision is not None:
        source_options["revision"] = revision
    texts = documents(source, **source_options)  # refuses before anything is made
    vocab_size, mark = vocabulary_size(tokenizer), fingerprint(tokenizer)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"

    left = max_tokens
    # The bar comes last: one that is left open when the folder refuses would stand in the line of the message.
    with (
        new_folder(output, seen) as folder,
        tqdm(unit=" tokens", unit_scale=True, leave=False, disable=not progress) as bar,
    ):
        writers = {split: ShardWriter(folder, split, dtype, shard_tokens) for split in SPLITS}
        for text, ids in _encoded(tokenizer, texts):
            row = np.array([*ids, end][:left], DTYPES[dtype])
            writers[split_of(text, validation)].write(row)
            bar.update(len(row))
            if left is not None:
                left -= len(row)
            if left == 0:
                break
        splits = {split: writer.close() for split, writer in writers.items()}
        if not splits["train"].tokens:
            raise ValueError(
                f"`validation` must leave some documents to train on, got {validation}, which holds out all "
                f"{splits['validation'].documents} of {source!r}. Lower it, or {MORE}."
            )
        # A folder without the split would be found by the next run, and refused for its share.
        if validation and not splits["validation"].tokens:
            raise ValueError(
                f"`validation` must hold out some documents, got {validation}, which holds out none of the "
                f"{splits['train'].documents} of {source!r}. Raise it, or {MORE}."
            )
        manifest = Manifest(
            VERSION,
            {"source": source, **source_options, "max_tokens": max_tokens},
            validation,
            mark,
            vocab_size,
            end,
            dtype,
            {split: facts for split, facts in splits.items() if facts.tokens},
        )
        manifest.write(folder)
        tokenizer.save_pretrained(folder)
        for name, content in (companions or {}).items():
            (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    return manifest


def from_tokens(
    files: Mapping[str, str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    vocab_size: int,
    end_of_text: int | None,
    dtype: str = "uint16",
    tokenizer: str | os.PathLike | PreTrainedTokenizerFast | None = None,
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
    progress: bool = True,
) -> Manifest:
    """
    The folder that [`prepare`] makes, from files of tokens that exist already; they are copied piece by piece.

    Args:
        files (`Mapping`): The file of the split `"train"`, and of `"validation"` if there is one; bare little-endian
            numbers.
        output_dir (`str` or `os.PathLike`): Folder to make.
        vocab_size (`int`): Every token is less than this.
        end_of_text (`int`, *optional*):
            The token after each document. None if nothing marks the end: windows then cross documents.
        dtype (`str`, defaults to `"uint16"`): Of the numbers, or `"uint32"`.
        tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerFast`, *optional*): Saved in the folder too.
        shard_tokens, force, progress: As for [`prepare`].

    Returns:
        [`Manifest`].

    Raises:
        ValueError: if an argument is impossible, a file is missing, empty or holds a token outside the vocabulary, the
            tokenizer has another vocabulary, or the output may not be written.
    """
    if "train" not in files or not set(files) <= set(SPLITS):
        raise ValueError(f"`files` must name the splits 'train' and maybe 'validation', got {sorted(files)}.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        raise ValueError(f"`end_of_text` must be in the vocabulary of {vocab_size} tokens, got {end_of_text}.")
    paths, itemsize = {split: Path(path) for split, path in files.items()}, DTYPES[dtype].itemsize
    for path in paths.values():
        if not path.is_file() or path.stat().st_size == 0 or path.stat().st_size % itemsize:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
            raise ValueError(
                f"`files` must be files of {dtype} numbers, {itemsize} bytes each, got {str(path)!r}: {size}. Check "
                "the path and `dtype`."
            )
    output = Path(output_dir)
    seen = check_tokens_output(output, paths.values(), force)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None and vocabulary_size(loaded) != vocab_size:
        raise ValueError(
            f"`tokenizer` must have the vocabulary of the files, {vocab_size} tokens, got {vocabulary_size(loaded)}. "
            "Give the tokenizer that made them, and its size as `vocab_size`."
        )

    total = sum(path.stat().st_size for path in paths.values()) // itemsize
    with (
        new_folder(output, seen) as folder,
        tqdm(total=total, unit=" tokens", unit_scale=True, disable=not progress) as bar,
    ):
        splits = {}
        for split, path in paths.items():
            writer, tokens = ShardWriter(folder, split, dtype, shard_tokens), np.memmap(path, DTYPES[dtype], mode="r")
            for start in range(0, len(tokens), CHUNK):
                piece = np.array(tokens[start : start + CHUNK])
                if piece.max() >= vocab_size:
                    raise ValueError(
                        f"`vocab_size` must be more than every token, got {vocab_size}, and {piece.max()} in "
                        f"{str(path)!r}. Check `vocab_size` and `dtype`."
                    )
                writer.write(piece, 0 if end_of_text is None else int((piece == end_of_text).sum()))
                bar.update(len(piece))
            splits[split] = writer.close(documents_known=end_of_text is not None)
        source = {"files": {split: str(path) for split, path in paths.items()}}
        mark = None if loaded is None else fingerprint(loaded)
        manifest = Manifest(VERSION, source, None, mark, vocab_size, end_of_text, dtype, splits)
        manifest.write(folder)
        if loaded is not None:
            loaded.save_pretrained(folder)
    return manifest


class TokenShards:
    """
    One split of a folder of tokens, memory-mapped: opening it reads nothing, and a long file needs no memory.

    Args:
        folder (`str` or `os.PathLike`): Made by [`prepare`] or [`from_tokens`].
        split (`str`, defaults to `"train"`): Or `"validation"`.

    Raises:
        ValueError: if the folder has no such split, its manifest is missing, newer or damaged, or a shard is missing
            or has not the size that the manifest says.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train"):
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.read(folder)
        if split not in self.manifest.splits:
            raise ValueError(
                f"`split` must be one of {', '.join(self.manifest.splits)}, which {str(folder)!r} has, got {split!r}. "
                "Prepare it with a larger share of `validation`, or from more documents."
            )
        self.dtype = DTYPES[self.manifest.dtype]
        self.shards = self.manifest.splits[split].shards
        for shard in self.shards:
            path, expected = self.folder / shard.file, shard.tokens * self.dtype.itemsize
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                held = "no such file" if size is None else f"{size} bytes"
                raise ValueError(
                    f"`folder` must hold the shards of its manifest, got {str(path)!r} with {held} for {expected} "
                    "bytes. Copy it again, or make the folder again."
                )
        self._maps = [np.memmap(self.folder / shard.file, self.dtype, mode="r") for shard in self.shards]
        self._starts = np.array([0, *accumulate(shard.tokens for shard in self.shards)])

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    def __reduce__(self):
        # Opened anew in a worker process: a memory map would be sent there with all that it maps.
        return type(self), (self.folder, self.split)

    def read(self, start: int, length: int) -> np.ndarray:
        """
        Tokens `[length]` from `start` on, across the borders of shards, as unsigned integers of the files' width.

        Raises:
            ValueError: if they are not all there.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise ValueError(
                f"`start` and `length` must lie within the {len(self)} tokens of {str(self.folder)!r}, got {start} "
                f"and {length}."
            )
        tokens, done = np.empty(length, self.dtype), 0
        while done < length:
            index = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            offset = start + done - int(self._starts[index])
            piece = self._maps[index][offset : offset + length - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
        return tokens

    def verify(self, progress: bool = True) -> None:
        """
        Read everything and compare the hashes with those of the manifest.

        Raises:
            ValueError: that names the first shard with another hash.
        """
        for shard in tqdm(self.shards, unit="shard", disable=not progress):
            path = self.folder / shard.file
            if (digest := file_sha256(path)) != shard.sha256:
                raise ValueError(
                    f"`folder` must hold the shards of its manifest, got {str(path)!r} with SHA-256 {digest} for "
                    f"{shard.sha256}. Copy it again, or make the folder again."
                )


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each document with its token ids; tokenised so many at once that it pays, and no more."""
    for batch in _batches(texts):
        yield from zip(batch, encode(tokenizer, batch), strict=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents that are worth tokenising at once, and small."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
