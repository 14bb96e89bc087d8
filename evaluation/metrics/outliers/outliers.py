"""Outliers of the stream and of every linear map's input, layer by layer."""

from rigpt_hf.evaluation.measures.outliers import outliers
from rigpt_hf.evaluation.metrics import base


class Outliers(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.outliers`."""

    measure = staticmethod(outliers)
