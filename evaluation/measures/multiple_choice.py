"""Accuracy of choosing the right one of several endings."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..likelihood import Progress, Side, no_progress
from ..measure import Measure
from ..models import evaluated
from ..questions import UNIT, made_of_documents, quantities, score_endings


CHOICES = 4


@dataclass(frozen=True)
class MultipleChoice:
    """
    A question and its possible answers.

    Args:
        prompt (`str`): What is read before an answer.
        choices (`list[str]`): Answers, each with the space it begins with.
        answer (`int`): Index of the right one.
    """

    prompt: str
    choices: Sequence[str]
    answer: int

    def __post_init__(self):
        if len(self.choices) < 2 or not all(self.choices):
            raise ValueError(f"`choices` must be at least two texts, none empty, got {list(self.choices)}.")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"`answer` must be an index of the {len(self.choices)} choices, got {self.answer}.")


def multiple_choice_accuracy(
    model: Any,
    examples: Sequence[MultipleChoice],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    batch_size: int = 8,
    padding_side: Side = "right",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """
    How often the likeliest choice is the right one, by the probability of the whole choice and by its mean logarithm
    per character. Between 0 and 1.

    Args:
        model, tokenizer: As for [`evaluated`].
        examples: Questions. Where the tokenizer begins texts with a token of its own, so do they; and where nothing
            comes before an answer.
        context (`int`, *optional*): Tokens that the model reads at once; prompts that are longer lose their beginning.
        batch_size, padding_side, progress: As for [`score`].

    Returns:
        `dict`: `accuracy`, by the probability of the whole choice; `accuracy_normalized`, by its mean logarithm per
        character, not counting the space it begins with, which does not favour short choices; `chance`, the accuracy
        of guessing; `examples`; `samples`, whether each was right, both ways; `protocol`.

    Raises:
        ValueError: if there is no example, or a choice alone is longer than the context.
    """
    measured = evaluated(model, tokenizer)
    context = measured.context(context)
    if not examples:
        raise ValueError("`examples` must hold at least one question, got none.")
    pairs = [(example.prompt, choice) for example in examples for choice in example.choices]
    own = {"batch_size": batch_size, "padding_side": padding_side, "progress": progress}
    scores = score_endings(measured, pairs, context, **own)
    right, right_normalized = [], []
    for example in examples:
        sums = [-float(next(scores).losses.sum()) for _ in example.choices]
        lengths = [len(choice.lstrip()) or len(choice) for choice in example.choices]
        means = [value / length for value, length in zip(sums, lengths, strict=True)]
        right.append(sums.index(max(sums)) == example.answer)
        right_normalized.append(means.index(max(means)) == example.answer)
    return {
        "accuracy": sum(right) / len(right),
        "accuracy_normalized": sum(right_normalized) / len(right),
        "chance": sum(1 / len(example.choices) for example in examples) / len(examples),
        "examples": len(examples),
        "samples": {"accuracy": right, "accuracy_normalized": right_normalized},
        "protocol": {"context": context, "normalized_by": "characters", "truncated": "left"},
    }


def endings(rows: list[str], count: int) -> list[MultipleChoice]:
    """
    At most `count` documents cut in half, with their own second half and those of others to choose from.

    Raises:
        ValueError: if there are fewer than four documents that are long enough.
    """
    draw = random.Random(0)
    halves = []
    for row in rows:
        words = row.split()[:80]
        if len(words) >= 16:
            middle = len(words) // 2
            halves.append((" ".join(words[:middle]), " " + " ".join(words[middle : middle + 12])))
    if len(halves) < CHOICES:
        raise ValueError(
            f"`documents` must be at least {CHOICES} of sixteen words or more, got {len(halves)}. Give more; {UNIT}."
        )
    questions = []
    for index, (prompt, own) in enumerate(halves[:count]):
        others = draw.sample([half for other, (_, half) in enumerate(halves) if other != index], CHOICES - 1)
        place = draw.randrange(CHOICES)
        questions.append(MultipleChoice(prompt, [*others[:place], own, *others[place:]], place))
    return questions


MEASURE = Measure(
    "multiple_choice",
    "How often is the true ending the likeliest of several?",
    multiple_choice_accuracy,
    quantities,
    needs=made_of_documents(endings),
    card_words="accuracy",
    hub_types={"accuracy": "accuracy", "accuracy, normalized": "accuracy_normalized"},
    difference_in=lambda quantity: "points",
)
