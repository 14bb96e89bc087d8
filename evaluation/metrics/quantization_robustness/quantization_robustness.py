"""Loss and perplexity under simulated rounding to few bits."""

from rigpt_hf.evaluation.measures.quantization_robustness import quantization_robustness
from rigpt_hf.evaluation.metrics import base


class QuantizationRobustness(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.quantization_robustness`."""

    measure = staticmethod(quantization_robustness)
