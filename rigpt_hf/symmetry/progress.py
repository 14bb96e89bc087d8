"""Progress bars of work whose length is an upper bound."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def bar_to(total: int, desc: str, unit: str, progress: bool) -> Iterator[Any]:
    """A progress bar over at most `total` units, which is full when all is done; hidden without `progress`."""
    with tqdm(total=total, desc=desc, unit=unit, disable=not progress) as bar:
        yield bar
        if progress:
            bar.total = bar.n
            bar.refresh()
