"""Accuracy over multiple choice, and on the last word of a text."""

from typing import Any

import datasets
import evaluate

from rigpt_hf.evaluation.measures.cloze import Cloze, cloze_accuracy
from rigpt_hf.evaluation.measures.multiple_choice import MultipleChoice, multiple_choice_accuracy


DESCRIPTION = """
The share of prompts whose right ending a model finds likelier than all others, by the probability of the whole ending
and by its mean logarithm per character; or, where there are no choices, the share whose ending is at every token the
likeliest (LAMBADA, Paperno et al., arXiv 1606.06031). Between 0 and 1.
"""

INPUTS = """
predictions: prompts.
choices: for each prompt its possible endings, each with the space it begins with; empty lists for a cloze.
references: for each prompt the index of the right choice, or for a cloze the ending itself.
model: a causal language model, or the folder or Hub id of one.
tokenizer: its tokenizer, or the folder or Hub id of one; not needed where it lies beside the model.
context, batch_size, padding_side.
Returns accuracy, for choices accuracy_normalized and chance, for a cloze target_perplexity; examples, samples and
protocol.
"""

CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Accuracy(evaluate.Measurement):
    """See `rigpt_hf.evaluation.measures.accuracy`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features(
                    {
                        "predictions": datasets.Value("string"),
                        "choices": datasets.Sequence(datasets.Value("string")),
                        "references": datasets.Value("int64"),
                    }
                ),
                datasets.Features(
                    {
                        "predictions": datasets.Value("string"),
                        "choices": datasets.Sequence(datasets.Value("string")),
                        "references": datasets.Value("string"),
                    }
                ),
            ],
        )

    def _compute(
        self, predictions: Any, choices: Any, references: Any, model: Any, tokenizer: Any = None, **options: Any
    ) -> dict[str, Any]:
        if isinstance(references[0], str):
            if any(choices):
                raise ValueError("`references` must be indices where there are `choices`, got texts.")
            texts = [Cloze(prompt, target) for prompt, target in zip(predictions, references, strict=True)]
            return cloze_accuracy(model, texts, tokenizer, **options)
        rows = zip(predictions, choices, references, strict=True)
        questions = [MultipleChoice(prompt, endings, answer) for prompt, endings, answer in rows]
        return multiple_choice_accuracy(model, questions, tokenizer, **options)
