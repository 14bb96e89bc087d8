"""The gauge error of random transformations, per frame and dtype."""

from typing import Any

import datasets
import evaluate

from rigpt_hf.evaluation.measures.invariance import invariance


DESCRIPTION = """
How much a random rotation of a model's inner spaces changes its logits, relative to the largest logit: max |Δlogit| /
max |logit|, dimensionless. Rounding for a model without a preferred basis, of order one for stock models, whose
stream is turned as far as it can be. Transformations are Haar-distributed; see Hashimoto, Hirono, Sannai, arXiv
2402.02362, for the symmetries.
"""

INPUTS = """
predictions: texts, or rows of token ids.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed for token ids, nor where it lies beside the model.
frame: one or several frames of the table of frames, or "all".
dtypes: of weights and arithmetic, such as ["float64", "float32"].
draws, seed: random transformations per frame and dtype.
Returns errors per frame and dtype (mean, largest), largest per dtype, and protocol.
"""

CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Invariance(evaluate.Measurement):
    """See `rigpt_hf.evaluation.measures.invariance`."""

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
        return invariance(model, predictions, tokenizer, **options)
