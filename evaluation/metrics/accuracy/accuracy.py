"""Accuracy over multiple choice, and on the last word of a text."""

from typing import Any

import datasets

from rigpt_hf.evaluation.measures.cloze import Cloze, cloze_accuracy
from rigpt_hf.evaluation.measures.multiple_choice import MultipleChoice, multiple_choice_accuracy
from rigpt_hf.evaluation.metrics import base


class Accuracy(base.TextMeasurement):
    """See `rigpt_hf.evaluation.measures.multiple_choice` and `cloze`."""

    measure = staticmethod(multiple_choice_accuracy)
    inputs = """
predictions: prompts.
choices: for each prompt its possible endings, each with the space it begins with; empty lists for a cloze.
references: for each prompt the index of the right choice, or for a cloze the ending itself.
For a cloze `accuracy` is the share whose ending is at every token the likeliest (LAMBADA, Paperno et al., arXiv
1606.06031), and `target_perplexity` stands in the place of what is said of choices.
"""
    features = [
        datasets.Features(
            {
                "predictions": datasets.Value("string"),
                "choices": datasets.Sequence(datasets.Value("string")),
                "references": datasets.Value(kind),
            }
        )
        for kind in ("int64", "string")
    ]

    def _compute(
        self, predictions: Any, model: Any, tokenizer: Any = None, *, choices: Any, references: Any, **options: Any
    ) -> dict[str, Any]:
        if isinstance(references[0], str):
            if any(choices):
                raise ValueError("`references` must be indices where there are `choices`, got texts.")
            texts = [Cloze(prompt, target) for prompt, target in zip(predictions, references, strict=True)]
            return cloze_accuracy(model, texts, tokenizer, **options)
        rows = zip(predictions, choices, references, strict=True)
        questions = [MultipleChoice(prompt, endings, answer) for prompt, endings, answer in rows]
        return multiple_choice_accuracy(model, questions, tokenizer, **options)
