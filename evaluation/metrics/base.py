"""The base of the modules: a measure, described by its own docstrings."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import evaluate


INPUTS = """
predictions: the texts, or rows of token ids.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed for token ids, nor where it lies beside the model.
All other arguments are those of the measure:
"""


class TextMeasurement(evaluate.Measurement):
    """
    A function of a model and texts, as a module of `evaluate`.

    Modules import this file, not this class: `evaluate` takes the first measurement that it finds in them for theirs.
    """

    measure: ClassVar[Callable[..., dict[str, Any]]]
    """Called with the model, the texts, the tokenizer and all options; its docstring describes the module."""
    inputs: ClassVar[str] = INPUTS
    features: ClassVar[list[datasets.Features]] = [
        datasets.Features({"predictions": datasets.Value("string")}),
        datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
    ]

    def _info(self) -> evaluate.EvaluationModuleInfo:
        measure = type(self).measure
        summary, _, arguments = (inspect.getdoc(measure) or "").partition("\n\nArgs:")
        return evaluate.MeasurementInfo(
            description=f"{inspect.getdoc(inspect.getmodule(measure))}\n\n{summary}",
            citation="",
            inputs_description=f"{self.inputs}{arguments}",
            features=self.features,
        )

    def _compute(self, predictions: Any, model: Any, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
        return type(self).measure(model, predictions, tokenizer, **options)
