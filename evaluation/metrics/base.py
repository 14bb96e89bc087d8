"""What the modules share that measure a model on texts."""

from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import evaluate


TEXTS_OR_IDS = [
    datasets.Features({"predictions": datasets.Value("string")}),
    datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
]
INPUTS = """
predictions: texts, or rows of token ids.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed for token ids, nor where it lies beside the model.
"""


class TextMeasurement(evaluate.Measurement):
    """
    A function of a model and texts, as a module of `evaluate`.

    Modules import this file, not this class: `evaluate` takes the first measurement that it finds in them for theirs.
    """

    description_of: ClassVar[str]
    """What is measured, in which unit, and where the definition comes from."""
    inputs_of: ClassVar[str]
    """Arguments beside the model and the texts, and what is returned."""
    measure: ClassVar[Callable[..., dict[str, Any]]]
    """Called with the model, the texts, the tokenizer and all options."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MeasurementInfo(
            description=self.description_of,
            citation="",
            inputs_description=INPUTS + self.inputs_of,
            features=TEXTS_OR_IDS,
        )

    def _compute(self, predictions: Any, model: Any, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
        return type(self).measure(model, predictions, tokenizer, **options)
