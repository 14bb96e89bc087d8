"""What models are measured on: documents, and questions that are made of them."""

import hashlib
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..measures.accuracy import Cloze, MultipleChoice
from .suites import TextOptions


# Characters of a page of documentation that is drawn, shorter ones say little; a question is made of so many at most.
SHORTEST, LONGEST = 200, 8000
# The last word of a sentence, without what ends it.
LAST_WORD = re.compile(r"^(.{40,}\S)( [A-Za-z]{3,})[.!?]$", re.DOTALL)
CHOICES = 4
# What people take for many documents is often one.
UNIT = "a .txt file is one document unless <|endoftext|> parts it, each row of JSONL or parquet is one"


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

        # What a model was pretrained on here would say how well it was learnt by heart.
        rows = gather_documentation(sys.maxsize, seed=1, part="held-out")
        rows = _share([row for row in rows if SHORTEST <= len(row) <= LONGEST][: options.documents], fraction)
    else:
        from rigpt_hf.text.sources import documents

        found = documents(
            options.source,
            text_column=options.column,
            split=options.split,
            name=options.name,
            revision=options.revision,
        )
        # Whole, however long: the metrics cut them into windows.
        rows = _share(list(islice(found, options.documents)), fraction)
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


def last_words(rows: list[str], count: int) -> list[Cloze]:
    """
    At most `count` texts without their last word, which is asked for; of those that also occur in the text before it,
    as in LAMBADA a reader can know it, no matter what they know otherwise. Only the first 8,000 characters of a
    document are searched.

    Raises:
        ValueError: if no document ends so.
    """
    found = []
    for row in (row[:LONGEST] for row in rows):
        for end in re.finditer(r"[.!?](?=\s|$)", row):
            match = LAST_WORD.match(row[: end.end()])
            if match and match[2].strip().lower() in match[1].lower().split():
                found.append(Cloze(match[1], match[2]))
                break
    if not found:
        raise ValueError(
            f"`documents` must hold one with a sentence that ends in a word from before, got {len(rows)} without. "
            f"Give more or longer ones; {UNIT}."
        )
    return found[:count]


def endings(rows: list[str], count: int, seed: int = 0) -> list[MultipleChoice]:
    """
    At most `count` documents cut in half, with their own second half and those of others to choose from.

    Raises:
        ValueError: if there are fewer than four documents that are long enough.
    """
    draw = random.Random(seed)
    halves = []
    for row in rows:
        words = row.split()[:80]
        if len(words) >= 16:
            middle = len(words) // 2
            halves.append((" ".join(words[:middle]), " " + " ".join(words[middle : middle + 12])))
    if len(halves) < CHOICES:
        raise ValueError(
            f"`documents` must be at least {CHOICES} of sixteen words or more, got {len(halves)}. Give more; {UNIT}."
        )
    questions = []
    for index, (prompt, own) in enumerate(halves[:count]):
        others = draw.sample([half for other, (_, half) in enumerate(halves) if other != index], CHOICES - 1)
        place = draw.randrange(CHOICES)
        questions.append(MultipleChoice(prompt, [*others[:place], own, *others[place:]], place))
    return questions
