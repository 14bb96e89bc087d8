"""
The symmetries of a RiGPT: one table of frames, and what follows from it.

Reading order: `rigpt_hf/groups` (what may act), `rigpt_hf/frames.py` (the table), `action` (how it acts),
`contraction` (what is measured in a frame), `local_frames` (one frame per layer); then, each on its own, `counting`,
`conservation` and `drift`, `balance` and `canonical`, `alignment`, `learned_alignment` and `merging`; `checkpoint` for
what does not fit in memory, `transport` for what was made for a model and lives beside it. Whether one model was made
from another: `sketch` and `fingerprint`, `common_form`, `layered`, `expectation`, `comparison` and `rates`.
"""

from ..frames import Frame, FrameKey, Table, table_of
from ..groups import (
    HeadPermutations,
    MatrixGroup,
    NeuronGroup,
    Translations,
    haar,
    o_log,
    rotary_form,
    so_exp,
    so_log,
)
from .action import GaugeTransformation, gauge_error
from .alignment import Alignment, align, find_alignment, gauge_distance
from .canonical import CanonicalGauge, canonical_gauge, canonicalize, invariants
from .comparison import Comparison, compare
from .conservation import Pairing, charges, gradient_pairing
from .counting import JacobianSpectrum, jacobian_spectrum, redundant_dimensions
from .drift import DriftReport, charge_drift
from .fingerprint import Fingerprint, fingerprint
from .learned_alignment import Learning, find_learned_alignment, learn_alignment
from .local_frames import connection, curvature, holonomy, to_global_frame, to_local_frames
from .merging import LossPath, loss_path, merge
from .transport import transport


__all__ = [
    "Alignment",
    "CanonicalGauge",
    "Comparison",
    "DriftReport",
    "Fingerprint",
    "Frame",
    "FrameKey",
    "GaugeTransformation",
    "HeadPermutations",
    "JacobianSpectrum",
    "Learning",
    "LossPath",
    "MatrixGroup",
    "NeuronGroup",
    "Pairing",
    "Table",
    "Translations",
    "align",
    "canonical_gauge",
    "canonicalize",
    "charge_drift",
    "charges",
    "compare",
    "connection",
    "curvature",
    "find_alignment",
    "find_learned_alignment",
    "fingerprint",
    "gauge_distance",
    "gauge_error",
    "gradient_pairing",
    "haar",
    "holonomy",
    "invariants",
    "jacobian_spectrum",
    "learn_alignment",
    "loss_path",
    "merge",
    "o_log",
    "redundant_dimensions",
    "rotary_form",
    "so_exp",
    "so_log",
    "table_of",
    "to_global_frame",
    "to_local_frames",
    "transport",
]
