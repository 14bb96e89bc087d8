"""Questions with a known answer: how likely a model finds it, and how a result is compared."""

from collections.abc import Iterator, Sequence
from typing import Any

from .likelihood import Score, Window, score
from .measure import Inputs, Quantity
from .models import EvaluatedModel


# Characters of a document that a question is made of at most.
LONGEST = 8000
# People often take one document for many.
UNIT = "a .txt file is one document unless <|endoftext|> parts it, each row of JSONL or parquet is one"


def score_endings(
    model: EvaluatedModel, pairs: Sequence[tuple[str, str]], context: int, **options: Any
) -> Iterator[Score]:
    """
    Score the second text of each pair after the first, which loses its beginning if it is too long.

    Args:
        model, options: As for [`score`].
        pairs: What is read before, and what is scored.
        context: Tokens that the model reads at once.

    Raises:
        ValueError: if a second text has no token of its own, or alone is longer than the context.
    """
    return score(model, [_window(model, prompt, ending, context) for prompt, ending in pairs], **options)


def _window(model: EvaluatedModel, prompt: str, ending: str, context: int) -> Window:
    """
    The tokens of both texts as one, of which those of the ending are asked for.

    Tokenizers merge across the joint, so both are encoded together; a space that the prompt ends with belongs to the
    first word of the ending, as in running text.
    """
    kept = prompt.rstrip()
    ending, prompt = prompt[len(kept) :] + ending, kept
    together = model.encode([prompt + ending], "examples")[0]
    before = len(model.encode([prompt], "examples")[0]) if prompt else 0
    if model.begins_texts or not before:
        # As the model was trained, or because something must be read before the first token that is asked for.
        together, before = [model.beginning(), *together], before + 1
    targets = together[before:]
    if not targets:
        raise ValueError(f"`examples` must end in a token of their own, got {ending!r} after {prompt[-40:]!r}.")
    if len(targets) > context:
        raise ValueError(f"`context` must hold a whole ending of {len(targets)} tokens, got {context}.")
    return Window(together[:-1][-context:], targets)


def made_of_documents(make: Any) -> Any:
    """The `needs` of a measure whose questions `make` makes from the task's documents."""

    def needs(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
        if texts.are_tokens:
            raise ValueError(f"`{task.name}` is made of words, and the suite's text is token ids. Leave it out.")
        return Inputs(make(texts.rows[: task.documents], task.examples), dict(task.arguments))

    return needs


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """The shares of questions that were answered rightly."""
    ones = [1.0] * result["examples"]
    return [
        Quantity(name, "", result[key], "more", [float(each) for each in result["samples"][key]], ones)
        for key, name in (("accuracy", "accuracy"), ("accuracy_normalized", "accuracy, normalized"))
        if key in result
    ]
