"""Text of another kind that every machine has: Python's own standard library."""

import random
import sysconfig
from pathlib import Path


LONGEST = 4000  # characters of a passage, so that no file is most of the text


def gather_code(max_bytes: int, seed: int = 0, root: Path | None = None) -> list[str]:
    """
    Passages of Python code, in an order that depends on `seed` alone.

    Args:
        max_bytes: Where to stop. All passages are found first, so that the sample does not favour any file.
        seed: Of the shuffle.
        root: Folder to search; the standard library's if not given.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    passages = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"}.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            passages += [text[start : start + LONGEST] for start in range(0, len(text), LONGEST)]
    random.Random(seed).shuffle(passages)
    kept, size = [], 0
    for passage in passages:
        size += len(passage.encode())
        if size > max_bytes:
            break
        kept.append(passage)
    return kept
