"""Speed and memory of models, side by side."""

from typing import Any

import datasets

from rigpt_hf.evaluation.measures.throughput import throughput
from rigpt_hf.evaluation.metrics import base


class Throughput(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.throughput`."""

    measure = staticmethod(throughput)
    inputs = """
predictions: names of the models, in the order of `models`.
models: the models, or folders or Hub ids; ratios are to the last one.
"""
    features = datasets.Features({"predictions": datasets.Value("string")})

    def _compute(self, predictions: Any, models: Any, **options: Any) -> dict[str, Any]:
        if len(predictions) != len(models):
            raise ValueError(
                f"`predictions` must name every one of `models`, got {len(predictions)} names of {len(models)} models."
            )
        return throughput(dict(zip(predictions, models, strict=True)), **options)
