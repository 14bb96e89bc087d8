"""Writing shards of tokens, hashed on the way."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rigpt_hf.checkpoints.disk import temporary_sibling
from rigpt_hf.checkpoints.folder import Seen, check_output

from .manifest import DTYPES, MANIFEST, Shard, Split


def check_tokens_output(output: Path, sources: Iterable[Path], force: bool) -> Seen:
    """
    Raise if an output folder may not be written; what it gives is as of [`check_output`].

    Args:
        output (`Path`): the folder.
        sources (`Iterable[Path]`): the files and folders that are read.
        force (`bool`): whether an earlier folder of tokens may be replaced.

    Raises:
        ValueError: if `output` is a file, holds a source, is not empty without `force`, or would be replaced with
            `force` although it has no `manifest.json`.
    """
    for source in sources:
        if output.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"`output_dir` must not hold the source, got {str(output)!r}. Name another folder.")
    if force and output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise ValueError(
            f"`output_dir` can be replaced only if it is a folder of tokens, got {str(output)!r}, which has no "
            f"`{MANIFEST}`. Remove it yourself, or name another folder."
        )
    # The sources have been looked at: nothing that exists is left to compare with.
    return check_output(output, str(temporary_sibling(output)), force)


class ShardWriter:
    """
    Writes the tokens of one split.

    Args:
        folder (`Path`): where the files go.
        split (`str`): what their names begin with.
        dtype (`str`): `"uint16"` or `"uint32"`.
        shard_tokens (`int`): tokens in a file.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, DTYPES[dtype], shard_tokens
        self.documents = 0
        self.shards: list[Shard] = []
        self.file: BinaryIO | None = None

    def write(self, tokens: np.ndarray, documents: int = 1) -> None:
        """Append tokens that end so many documents."""
        self.documents += documents
        while len(tokens):
            if self.file is None:
                self.file = (self.folder / f"{self.split}-{len(self.shards):05}.bin").open("wb")
                self.digest, self.tokens = hashlib.sha256(), 0
            piece = tokens[: self.shard_tokens - self.tokens]
            data = piece.astype(self.dtype, copy=False).tobytes()
            self.file.write(data)
            self.digest.update(data)
            self.tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self.tokens == self.shard_tokens:
                self._finish(self.file)

    def close(self, documents_known: bool = True) -> Split:
        """Finish the last file and say what was written; no tokens, no files."""
        if self.file is not None:
            self._finish(self.file)
        tokens = sum(shard.tokens for shard in self.shards)
        return Split(self.documents if documents_known else None, tokens, tuple(self.shards))

    def _finish(self, file: BinaryIO) -> None:
        file.close()
        self.file = None
        self.shards.append(Shard(Path(file.name).name, self.tokens, self.digest.hexdigest()))
