"""
One call for the figures of a chapter, wherever it runs: a notebook displays them, `rigpt lab` saves them, a plain
script says that they exist.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from matplotlib.figure import Figure


# Of pictures in notebooks and files, per inch.
DOTS = 110


@dataclass(frozen=True)
class Shown:
    """
    A figure, and what is to be seen in it.

    Args:
        figure: As drawn.
        name: Of its file, after that of the lab; empty if the lab has one figure only.
        seen: In words, with the numbers.
    """

    figure: Figure
    name: str
    seen: str


@dataclass
class Session:
    """A chapter that runs under `rigpt lab`: its seed, and the figures it has shown so far."""

    seed: int
    shown: list[Shown] = field(default_factory=list)


_SESSION: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def session(seed: int) -> Iterator[Session]:
    """Inside of this block `show` keeps figures instead of displaying them, and `chosen_seed` gives `seed`."""
    current = Session(seed)
    token = _SESSION.set(current)
    try:
        yield current
    finally:
        _SESSION.reset(token)


def chosen_seed(default: int = 0) -> int:
    """The seed that `rigpt lab --seed` was given; `default` where a chapter runs by itself."""
    current = _SESSION.get()
    return default if current is None else current.seed


def show(figure: Figure, name: str, seen: str) -> None:
    """
    Show a figure of a chapter.

    Args:
        figure: Made without pyplot, so that it looks the same everywhere.
        name: A word for its file.
        seen: What is to be seen in it, with the numbers.

    Raises:
        ValueError: if the chapter has shown a figure of that name.
    """
    current = _SESSION.get()
    if current is not None:
        if any(earlier.name == name for earlier in current.shown):
            raise ValueError(f"`name` must be new in its chapter, got {name!r} twice. Name the figures differently.")
        current.shown.append(Shown(figure, name, seen))
        return
    if _in_notebook():
        from IPython.display import Image, display

        display(Image(png(figure), width=round(figure.get_figwidth() * 72)))
    print(f"[{name}] {seen}")


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure and version of Matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")
