"""
The groups that act on frames, each with all that follows from it: `rotation` (orthogonal matrices, exponential and
logarithm), `matrix` (rotations and stretches), `gain` (what gains of heads leave of these), `permutation` (of heads
and of neurons), `translation`.
"""

from .base import DEGENERATE, SPREAD, UNSIGNED, Group, Role
from .gain import GainScalings, HalfTurns
from .matrix import MatrixGroup, Stretch, general_linear, orthogonal
from .permutation import ExpertPermutations, HeadPermutations, NeuronGroup, assignment
from .rotation import haar, o_log, rotary_form, so_exp, so_log
from .translation import Translations


__all__ = [
    "DEGENERATE",
    "SPREAD",
    "UNSIGNED",
    "ExpertPermutations",
    "GainScalings",
    "Group",
    "HalfTurns",
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
