"""The gauge error of random transformations, per frame and dtype."""

from rigpt_hf.evaluation.measures.invariance import invariance
from rigpt_hf.evaluation.metrics import base


DESCRIPTION = """
How much a random rotation of a model's inner spaces changes its logits, relative to the largest logit: max |Δlogit| /
max |logit|, dimensionless. Rounding for a model without a preferred basis, of order one for stock models, whose
stream is turned as far as it can be. Transformations are Haar-distributed; see Hashimoto, Hirono, Sannai, arXiv
2402.02362, for the symmetries.
"""
INPUTS = """
frame: one or several frames of the table of frames, or "all".
dtypes: of weights and arithmetic, such as ["float64", "float32"].
draws, seed: random transformations per frame and dtype.
Returns errors per frame and dtype (mean, largest), largest per dtype, and protocol.
"""


class Invariance(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.invariance`."""

    description_of, inputs_of, measure = DESCRIPTION, INPUTS, staticmethod(invariance)
