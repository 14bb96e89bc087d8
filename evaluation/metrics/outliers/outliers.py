"""Outliers of the stream and of every linear map's input, layer by layer."""

from typing import Any

import datasets
import evaluate

from rigpt_hf.evaluation.measures.outliers import outliers


DESCRIPTION = """
Excess kurtosis, largest over median absolute value and crest factor of the residual stream after every layer and of
every linear map's input: per token over its coordinates (mean over tokens) and pooled, with and without the first
position. Dimensionless; 0 excess kurtosis is a Gaussian. The summary holds the definition of Outlier-Safe Pre-
Training (Park et al., arXiv 2506.19697) as we read it.
"""

INPUTS = """
predictions: texts, or rows of token ids.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed for token ids, nor where it lies beside the model.
context, windows: tokens of a window, and how many are read.
Returns stream (a list), linear_inputs (by module), summary and protocol.
"""

CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Outliers(evaluate.Measurement):
    """See `rigpt_hf.evaluation.measures.outliers`."""

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
        return outliers(model, predictions, tokenizer, **options)
