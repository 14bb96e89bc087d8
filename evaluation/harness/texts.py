"""The texts that models are measured on: documents, or rows of token ids."""

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .suites import TextOptions


# Characters of a page of documentation that is drawn: shorter ones say little.
SHORTEST, LONGEST = 200, 8000


@dataclass(frozen=True)
class Texts:
    """
    Documents, or rows of token ids.

    Args:
        rows (`list[str]` or `list[list[int]]`): In an order that is always the same.
        source (`dict`): Where they come from, with a hash of all of them, as the results say it.
    """

    rows: list[Any]
    source: dict[str, Any]

    @property
    def are_tokens(self) -> bool:
        """Whether these are token ids of somebody's tokenizer."""
        return not isinstance(self.rows[0], str)


def load_texts(options: TextOptions, fraction: float = 1.0) -> Texts:
    """
    The documents of a suite.

    Args:
        options: Which.
        fraction: Share of those that there are, the first ones; of token ids as many windows, over the whole file.

    Raises:
        ValueError: if there are none, or the source cannot be read.
    """
    if options.documents < 1:
        raise ValueError(f"`documents` must be at least 1, got {options.documents}.")
    if options.source.endswith(".bin"):
        rows: list[Any] = _windows(options, fraction)
    elif options.source == "docs":
        from rigpt_hf.text.corpus import gather_documentation

        # The text that a model was pretrained on here would say how well it was learnt by heart.
        rows = gather_documentation(sys.maxsize, seed=1, part="held-out")
        rows = _share([row for row in rows if SHORTEST <= len(row) <= LONGEST][: options.documents], fraction)
    else:
        from rigpt_hf.text.sources import documents

        place: dict[str, Any] = {"split": options.split, "name": options.name, "revision": options.revision}
        # Whole, however long: the measures cut them into windows.
        read = islice(documents(options.source, text_column=options.column, **place), options.documents)
        rows = _share(list(read), fraction)
    if not rows:
        raise ValueError(f"`source` must hold at least one document, got none from {options.source!r}.")
    digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
    name = options.source if options.source == "docs" else name_of(options.source)
    return Texts(rows, {"source": name, "documents": len(rows), "sha256": digest, "revision": options.revision})


def name_of(source: str) -> str:
    """The last part of a path, as nobody needs to know where things lie on this machine; a Hub id as it is."""
    return Path(os.path.abspath(source)).name if os.path.exists(source) else source


def _share(rows: list[Any], fraction: float) -> list[Any]:
    return rows[: math.ceil(fraction * len(rows))]


def _windows(options: TextOptions, fraction: float) -> list[list[int]]:
    path = Path(options.source)
    if not path.is_file() or options.window < 2:
        raise ValueError(
            f"`source` must be a file of token ids and `window` at least 2, got {str(path)!r} and {options.window}."
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    count = math.ceil(fraction * min(options.documents, len(tokens) // options.window))
    # Evenly over the whole file.
    starts = np.linspace(0, max(len(tokens) - options.window, 0), count, dtype=np.int64)
    return [tokens[start : start + options.window].astype(np.int64).tolist() for start in starts]
