"""The gauge error of random transformations, per frame and dtype."""

from rigpt_hf.evaluation.measures.invariance import invariance
from rigpt_hf.evaluation.metrics import base


class Invariance(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.invariance`."""

    measure = staticmethod(invariance)
