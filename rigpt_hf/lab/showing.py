"""
One call for the figures of a chapter, wherever it runs: a notebook displays them, `rigpt lab` saves them, a plain
script says that they exist.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..pictures.style import encoded, figure, use_style


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Shown:
    """
    A figure and its description.

    Args:
        figure: As drawn.
        name: Name of its file, after that of the lab; empty if the lab has one figure only.
        seen: In words, with the numbers.
    """

    figure: "Figure"
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
    import matplotlib as mpl

    current = Session(seed)
    token = _SESSION.set(current)
    try:
        with mpl.rc_context():
            yield current
    finally:
        _SESSION.reset(token)


def chosen_seed(default: int = 0) -> int:
    """The seed that `rigpt lab --seed` was given; `default` where a chapter runs by itself."""
    current = _SESSION.get()
    return default if current is None else current.seed


def panels(
    count: int, title: str, height: float = 3.8, width: float = 4.6, **options: Any
) -> tuple["Figure", list[Any]]:
    """
    A figure of a chapter, with `count` panels side by side.

    Args:
        count: Number of panels.
        title: A description.
        height, width: Size of one panel, in inches.
        options: As for [`rigpt_hf.pictures.figure`], such as `sharey=True`.

    Returns:
        The figure and its axes.
    """
    # A chapter is a program of its own, and draws on after this call.
    use_style()
    return figure(count, title=title, height=height, width=width, **options)


def show(figure: "Figure", name: str, seen: str) -> None:
    """
    Show a figure of a chapter.

    Args:
        figure: Made without pyplot, so that it looks the same everywhere.
        name: A word for its file.
        seen: A description, with the numbers.

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

        display(Image(encoded(figure), width=round(figure.get_figwidth() * 72)))
    print(f"[{name}] {seen}")


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")
