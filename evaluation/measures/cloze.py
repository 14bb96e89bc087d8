"""Accuracy of naming the last word of a text."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..likelihood import Progress, Side, exponential, no_progress
from ..measure import Measure
from ..models import evaluated
from ..questions import LONGEST, UNIT, made_of_documents, quantities, score_endings


# The last word of a sentence, without what ends it.
LAST_WORD = re.compile(r"^(.{40,}\S)( [A-Za-z]{3,})[.!?]$", re.DOTALL)


@dataclass(frozen=True)
class Cloze:
    """
    A text and how it ends.

    Args:
        prompt (`str`): What is read before the end.
        target (`str`): The end, with the space it begins with.
    """

    prompt: str
    target: str

    def __post_init__(self):
        if not self.target.strip():
            raise ValueError(f"`target` must be some text, got {self.target!r}.")


def cloze_accuracy(
    model: Any,
    examples: Sequence[Cloze],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    batch_size: int = 8,
    padding_side: Side = "right",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """
    How often a model would end a text as it ends, token by token the likeliest (as LAMBADA is scored).

    Args:
        model, tokenizer: As for [`evaluated`].
        examples: Texts and their ends.
        context, batch_size, padding_side, progress: As for [`perplexity`].

    Returns:
        `dict`: `accuracy`; `target_perplexity`, the exponential of the mean over examples of minus the logarithm of
        the probability of the whole end; `examples`; `samples`: per example whether it was right, and the nats;
        `protocol`.

    Raises:
        ValueError: if there is no example, or an end alone is longer than the context.
    """
    measured = evaluated(model, tokenizer)
    context = measured.context(context)
    if not examples:
        raise ValueError("`examples` must hold at least one text, got none.")
    pairs = [(example.prompt, example.target) for example in examples]
    own = {"batch_size": batch_size, "padding_side": padding_side, "progress": progress}
    scores = list(score_endings(measured, pairs, context, **own))
    right = [bool(score.greedy.all()) for score in scores]
    nats = [float(score.losses.sum()) for score in scores]
    return {
        "accuracy": sum(right) / len(right),
        "target_perplexity": exponential(math.fsum(nats) / len(nats)),
        "examples": len(examples),
        "samples": {"accuracy": right, "nats": nats},
        "protocol": {"context": context, "truncated": "left"},
    }


def last_words(rows: list[str], count: int) -> list[Cloze]:
    """
    At most `count` texts without their last word, which is asked for; of those that also occur in the text before it,
    as in LAMBADA a reader can know it, no matter what they know otherwise. Only the first 8,000 characters of a
    document are searched.

    Raises:
        ValueError: if no document ends so.
    """
    questions = []
    for row in (row[:LONGEST] for row in rows):
        for end in re.finditer(r"[.!?](?=\s|$)", row):
            match = LAST_WORD.match(row[: end.end()])
            if match and match[2].strip().lower() in match[1].lower().split():
                questions.append(Cloze(match[1], match[2]))
                break
    if not questions:
        raise ValueError(
            f"`documents` must hold one with a sentence that ends in a word from before, got {len(rows)} without. "
            f"Give more or longer ones; {UNIT}."
        )
    return questions[:count]


MEASURE = Measure(
    "cloze",
    "How often does the model end a text with the very word that it ends with?",
    cloze_accuracy,
    quantities,
    needs=made_of_documents(last_words),
    card_words="accuracy",
    hub_types={"accuracy": "accuracy"},
    difference_in=lambda quantity: "points",
)
