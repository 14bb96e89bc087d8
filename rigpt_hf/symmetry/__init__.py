"""The symmetries of a RiGPT: one table of frames, the groups that act on them, and transformations of models."""

from .action import GaugeTransformation, gauge_error
from .frames import Axis, Frame, axes, frames
from .groups import MatrixGroup
from .permutations import HeadPermutations, NeuronGroup, Translations
from .rotations import haar, o_log, rotary_form, so_exp, so_log


__all__ = [
    "Axis",
    "Frame",
    "GaugeTransformation",
    "HeadPermutations",
    "MatrixGroup",
    "NeuronGroup",
    "Translations",
    "axes",
    "frames",
    "gauge_error",
    "haar",
    "o_log",
    "rotary_form",
    "so_exp",
    "so_log",
]
