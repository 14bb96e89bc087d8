"""English text that every machine has: the docstrings and documents of the installed Python packages."""

import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from ..status import doing
from .files import local_documents


# A string that stands alone at the start of a line is a docstring, or a comment in its place.
DOCSTRING = re.compile(r"^[ \t]*[rRuU]?(\"\"\"|''')(.*?)\1", re.MULTILINE | re.DOTALL)
DOCUMENT_SUFFIXES = (".md", ".rst")
SHORTEST, LONGEST = 40, 2000  # characters of a paragraph; shorter ones say little, longer ones are no paragraphs
SMALLEST_SHARE_OF_LETTERS = 0.85  # letters and spaces; below that it is a table or code
# One paragraph in so many, by its hash, is kept for evaluation and not trained on.
HELD_OUT = 8
# Docstrings are copied and changed a little; with so many words in a row in common they are no other text.
COPIED = 13
RULER = "---"  # underlines the headings that NumPy's style of docstring puts above a table of arguments


@doing("Gathering documentation")
def gather_documentation(
    max_bytes: int,
    seed: int = 0,
    tick: Callable[[int], None] | None = None,
    roots: list[Path] | None = None,
    part: Literal["all", "training", "held-out"] = "all",
) -> list[str]:
    """
    Paragraphs of English from docstrings and documents, deduplicated, in an order that depends on `seed` alone.

    Code, tables, lists of arguments and headings are left out: what a small model can learn in minutes is prose.

    Args:
        max_bytes: Where to stop. All paragraphs are found first, so that the sample does not favour any package.
        seed: Of the shuffle.
        tick: Called with the number of files read since the last call, instead of the bar on a terminal.
        roots: Folders to search; the standard library and the installed packages if not given.
        part: Which paragraphs: those to train on; the eighth that their own hash holds out, so that it is the same
            however they are shuffled, but for those that share 13 words in a row with one to train on; or all.
    """
    if roots is None:
        roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
    seen: set[bytes] = set()
    passages: list[str] = []
    others: list[str] = []
    files = list(_files(roots))
    hidden = None if tick is None else True
    for path in tqdm(files, "Gathering documentation", unit="file", leave=False, delay=1, disable=hidden):
        if tick:
            tick(1)
        for passage in _passages(path):
            digest = hashlib.blake2b(passage.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                wanted = part == "all" or (part == "held-out") == (digest[0] % HELD_OUT == 0)
                (passages if wanted else others).append(passage)
    if part == "held-out":
        passages = without_copies(passages, others)
    random.Random(seed).shuffle(passages)
    kept, size = [], 0
    for passage in passages:
        size += len(passage.encode())
        if size > max_bytes:
            break
        kept.append(passage)
    return kept


def without_copies(passages: list[str], others: list[str]) -> list[str]:
    """The passages that have no run of words in common with any of the others."""
    own = [_runs(passage) for passage in passages]
    wanted = set().union(*own)
    copied: set[str] = set()
    for other in others:
        copied |= _runs(other) & wanted
    return [passage for passage, runs in zip(passages, own, strict=True) if not runs & copied]


def _runs(passage: str) -> set[str]:
    words = passage.split()
    return {" ".join(words[start : start + COPIED]) for start in range(len(words) - COPIED + 1)}


def read_text(path: Path) -> list[str]:
    """
    The passages of a file or folder of texts, which blank lines separate.

    Raises:
        ValueError: if it does not exist, cannot be read or holds no text.
    """
    text = "\n\n".join(local_documents(path, argument="text"))
    passages = [passage.strip() for passage in re.split(r"\n\s*\n", text) if passage.strip()]
    if not passages:
        raise ValueError(f"`text` must hold some text, got {str(path)!r}, where all is blank. Name another file.")
    return passages


def _files(roots: list[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for root in roots:
        for path in sorted(root.rglob("*")):
            wanted = path.suffix in (".py", *DOCUMENT_SUFFIXES) or path.name == "METADATA"
            if wanted and path not in seen and not {"test", "tests"}.intersection(path.relative_to(root).parts):
                seen.add(path)
                yield path


def _passages(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # not ours to mend; there are thousands of other files
    if path.suffix == ".py":
        text = "\n\n".join(match[2] for match in DOCSTRING.finditer(text))
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if SHORTEST <= len(paragraph) <= LONGEST and _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    """Whether it begins and ends as sentences do, and is made of words."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        paragraph[0].isupper()
        and paragraph[-1] in ".!?"
        and letters >= SMALLEST_SHARE_OF_LETTERS * len(paragraph)
        and RULER not in paragraph
    )
