"""Loss and perplexity under simulated rounding to few bits."""

from rigpt_hf.evaluation.measures.quantization_robustness import quantization_robustness
from rigpt_hf.evaluation.metrics import base


DESCRIPTION = """
What a model loses, in nats per token, when the weights of its linear maps (per row or per group) and their inputs
(per token) are rounded to nearest on symmetric grids, without calibration but of principal axes: W8A8, W4A16, W4A8,
W4A4 and any other, in its own frame, a random one, a Hadamard one (QuaRot, Ashkboos et al., arXiv 2404.00456) and
along its principal axes (SliceGPT, Ashkboos et al., arXiv 2401.15024).
"""
INPUTS = """
schemes: such as ["W4A16"]; 16 bits are left as they are.
frames: among "identity", "haar", "hadamard", "pca"; stock models are converted first for all but the first.
group_size, modules_to_not_convert: neighbours that share a scale, and modules left alone.
bos, detokenizer: as for perplexity, so that both score the same tokens.
context, batch_size, seed.
Returns loss, perplexity, rounded (per frame and scheme: loss, perplexity, increase, samples) and protocol.
"""


class QuantizationRobustness(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.quantization`."""

    description_of, inputs_of, measure = DESCRIPTION, INPUTS, staticmethod(quantization_robustness)
