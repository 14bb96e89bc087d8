"""Loss and perplexity under simulated rounding to few bits."""

from typing import Any

import datasets
import evaluate

from rigpt_hf.evaluation.measures.quantization import quantization_robustness


DESCRIPTION = """
What a model loses, in nats per token, when the weights of its linear maps (per row or per group) and their inputs
(per token) are rounded to nearest on symmetric grids, without calibration: W8A8, W4A16, W4A8, W4A4 and any other, in
its own frame, a random one, a Hadamard one (QuaRot, Ashkboos et al., arXiv 2404.00456) and along its principal axes
(SliceGPT, Ashkboos et al., arXiv 2401.15024).
"""

INPUTS = """
predictions: texts, or rows of token ids.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed for token ids, nor where it lies beside the model.
schemes: such as ["W4A16"]; 16 bits are left as they are.
frames: among "identity", "haar", "hadamard", "pca"; stock models are converted first for all but the first.
group_size, leave: neighbours that share a scale, and modules left alone.
context, batch_size, seed.
Returns loss, perplexity, rounded (per frame and scheme: loss, perplexity, increase, samples) and protocol.
"""

CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class QuantizationRobustness(evaluate.Measurement):
    """See `rigpt_hf.evaluation.measures.quantization`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(self, predictions: Any, model: Any, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
        return quantization_robustness(model, predictions, tokenizer, **options)
