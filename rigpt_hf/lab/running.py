"""Makes the figures of a lab: a chapter by running its script, the rest by calling a function."""

import contextlib
import io
import runpy
from importlib import import_module

from ..extras import advice
from .registry import Lab, is_there, lab, script_of
from .showing import Shown, session


def run_lab(name: str, seed: int = 0) -> list[Shown]:
    """
    The figures of a lab.

    Args:
        name: A name from the registry.
        seed: Seed of everything random in it.

    Raises:
        ValueError: if there is no such lab, this version has no code for it, or a package that it needs is missing.
    """
    chosen = lab(name)
    if not is_there(chosen):
        raise ValueError(
            f"`name` must be a lab whose code is there, got {name!r}: this version has no "
            f"{chosen.function or chosen.chapter}. `rigpt lab` says which it has."
        )
    try:
        return _run_chapter(chosen, seed) if chosen.chapter else [_call(chosen, seed)]
    except AssertionError as error:
        # Derived results hold for every seed; results of training for nearly every one.
        claim = f": {error}" if str(error) else ""
        raise ValueError(
            f"`seed` must be one with which the checks of {name!r} hold, got {seed}{claim}. Take another one."
        ) from error
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`name` must be a lab whose packages are there, got {name!r}, which needs {error.name}. "
            f"{advice(error) or 'Install it.'}"
        ) from error


def _run_chapter(chapter: Lab, seed: int) -> list[Shown]:
    import torch

    dtype = torch.get_default_dtype()
    # A chapter's output belongs to its text, which is not here.
    with session(seed) as current, torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(str(script_of(chapter)), run_name="rigpt_lab")
        finally:
            torch.set_default_dtype(dtype)
    return current.shown


def _call(chosen: Lab, seed: int) -> Shown:
    from matplotlib.figure import Figure

    module, _, name = chosen.function.partition(":")
    figure = getattr(import_module(module), name)(seed=seed)
    if not isinstance(figure, Figure):
        raise TypeError(f"{chosen.function} must return a Matplotlib figure, got {type(figure).__name__}")
    title = figure.get_suptitle() or next((axes.get_title() for axes in figure.axes if axes.get_title()), "")
    return Shown(figure, "", title.replace("\n", " ") or chosen.line)
