"""Speed and memory of models, side by side."""

from typing import Any

import datasets
import evaluate

from rigpt_hf.evaluation.measures.throughput import throughput


DESCRIPTION = """
Prefill and decoding speed (tokens per second), time to the first token (seconds) and peak memory (bytes) of several
models that take turns in one process on the same random prompt, so that ratios mean something on a busy machine.
"""

INPUTS = """
predictions: names of the models, in the order of `models`.
models: the models, or folders or Hub ids; ratios are to the last one.
prompt, new_tokens, batch_size, turns, memory, seed.
Returns per model prefill_tokens_per_second, decode_tokens_per_second, time_to_first_token (s), each with median and
quartiles, and peak_memory (bytes); ratios, and protocol.
"""

CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Throughput(evaluate.Measurement):
    """See `rigpt_hf.evaluation.measures.throughput`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: Any, models: Any, **options: Any) -> dict[str, Any]:
        if len(predictions) != len(models):
            raise ValueError(
                f"`predictions` must name every one of `models`, got {len(predictions)} names of {len(models)} models."
            )
        return throughput(dict(zip(predictions, models, strict=True)), **options)
