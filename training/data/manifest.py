"""The manifest of a folder of tokens: the shards of its splits, their hashes, the tokenizer and the source."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rigpt_hf.checkpoints.written import parse_json


MANIFEST, VERSION = "manifest.json", 1
# Little-endian, whatever the machine.
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order; `documents` is None where nothing marks their ends."""

    documents: int | None
    tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The contents and the origin of a folder of shards; `manifest.json`."""

    version: int
    source: dict[str, Any]
    """Where the tokens come from, and the options that chose among it."""
    validation: float | None
    """Share of the documents held out; None where the split was made elsewhere."""
    tokenizer: str | None
    """Fingerprint of the tokenizer: SHA-256 of its serialised backend."""
    vocab_size: int
    end_of_text: int | None
    """Id of the token after each document; None if there is none."""
    dtype: str
    splits: dict[str, Split]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Manifest":
        """
        The manifest of a folder.

        Raises:
            ValueError: if there is none, it is of a newer version, or it is damaged.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"`folder` must be a folder of tokens with a `{MANIFEST}`, got {str(folder)!r}. Make one with "
                "`prepare`."
            )
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            if (version := values["version"]) <= VERSION:
                values["splits"] = {
                    split: Split(**facts | {"shards": tuple(Shard(**shard) for shard in facts["shards"])})
                    for split, facts in values["splits"].items()
                }
                manifest = cls(**values)
                DTYPES[manifest.dtype]
                return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it lacks or does not know {error}" if isinstance(error, KeyError) else "its fields are others"
            if isinstance(error, ValueError):
                known = {json.JSONDecodeError: "it is not JSON", UnicodeDecodeError: "it is not UTF-8"}
                reason = known.get(type(error), str(error))
            raise ValueError(
                f"`folder` must have an undamaged `{MANIFEST}`, got {str(folder)!r}: {reason}. Make the folder again."
            ) from error
        raise ValueError(
            f"`folder` must have a manifest of version {VERSION} at most, got version {version} in {str(folder)!r}. "
            "Update rigpt-hf."
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into the folder."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
