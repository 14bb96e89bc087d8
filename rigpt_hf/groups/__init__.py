"""
The groups that act on frames, each with all that follows from it: `rotation` (orthogonal matrices, exponential and
logarithm), `matrix` (rotations and stretches), `permutation` (of heads and of neurons), `translation`.
"""

from .base import DEGENERATE, SPREAD, UNSIGNED, Group, Role
from .matrix import MatrixGroup, Stretch, general_linear, orthogonal
from .permutation import HeadPermutations, NeuronGroup, assignment
from .rotation import haar, o_log, rotary_form, so_exp, so_log
from .translation import Translations


__all__ = [
    "DEGENERATE",
    "SPREAD",
    "UNSIGNED",
    "Group",
    "HeadPermutations",
    "MatrixGroup",
    "NeuronGroup",
    "Role",
    "Stretch",
    "Translations",
    "assignment",
    "general_linear",
    "haar",
    "o_log",
    "orthogonal",
    "rotary_form",
    "so_exp",
    "so_log",
]
