"""The symmetries of a RiGPT: one table of frames, the groups that act on them, and transformations of models."""

from .action import GaugeTransformation, gauge_error
from .alignment import Alignment, align, find_alignment, gauge_distance
from .canonical import CanonicalGauge, canonical_gauge, canonicalize, invariants
from .conservation import Pairing, charges, gradient_pairing
from .counting import JacobianSpectrum, jacobian_spectrum, redundant_dimensions
from .frames import Axis, Frame, axes, frames
from .groups import MatrixGroup
from .permutations import HeadPermutations, NeuronGroup, Translations
from .rotations import haar, o_log, rotary_form, so_exp, so_log


__all__ = [
    "Alignment",
    "Axis",
    "CanonicalGauge",
    "Frame",
    "GaugeTransformation",
    "HeadPermutations",
    "JacobianSpectrum",
    "MatrixGroup",
    "NeuronGroup",
    "Pairing",
    "Translations",
    "align",
    "axes",
    "canonical_gauge",
    "canonicalize",
    "charges",
    "find_alignment",
    "frames",
    "gauge_distance",
    "gauge_error",
    "gradient_pairing",
    "haar",
    "invariants",
    "jacobian_spectrum",
    "o_log",
    "redundant_dimensions",
    "rotary_form",
    "so_exp",
    "so_log",
]
