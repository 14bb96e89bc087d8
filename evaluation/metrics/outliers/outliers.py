"""Outliers of the stream and of every linear map's input, layer by layer."""

from rigpt_hf.evaluation.measures.outliers import outliers
from rigpt_hf.evaluation.metrics import base


DESCRIPTION = """
Excess kurtosis, largest over median absolute value and crest factor of the residual stream after every layer and of
every linear map's input: per token over its coordinates (mean over tokens) and pooled, with and without the first
position. Dimensionless; 0 excess kurtosis is a Gaussian. The summary holds the definition of Outlier-Safe Pre-
Training (Park et al., arXiv 2506.19697) as we read it.
"""
INPUTS = """
context, windows: tokens of a window, and how many are read.
Returns stream (a list), linear_inputs (by module), summary and protocol.
"""


class Outliers(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.outliers`."""

    description_of, inputs_of, measure = DESCRIPTION, INPUTS, staticmethod(outliers)
