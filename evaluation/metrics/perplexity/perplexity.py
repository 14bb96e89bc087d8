"""Perplexity per token, word and byte, with its protocol as arguments."""

from rigpt_hf.evaluation.measures.perplexity import perplexity
from rigpt_hf.evaluation.metrics import base


class Perplexity(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.perplexity`."""

    measure = staticmethod(perplexity)
