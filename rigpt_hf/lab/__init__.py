"""
Figures that explain RiGPT, and the course that most of them come from.

`registry` lists them, `running` makes them, `showing` is what a chapter calls to draw and to show one, `notebooks`
makes the notebooks of the course from its scripts. At the terminal: `rigpt lab`.
"""

from ..pictures.style import COLOURS
from .showing import Shown, chosen_seed, panels, show


__all__ = ["COLOURS", "Shown", "chosen_seed", "panels", "show"]
