"""Accuracy where the right answer is known: choosing among endings, and naming the last word."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .likelihood import Score, Side, Tick, Window, no_tick, score
from .perplexity import beginning, exponential
from .subjects import Subject, subject


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


def multiple_choice_accuracy(
    model: Any,
    examples: Sequence[MultipleChoice],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    batch_size: int = 8,
    padding_side: Side = "right",
    tick: Tick = no_tick,
) -> dict[str, Any]:
    """
    How often the likeliest choice is the right one.

    Args:
        model, tokenizer: As for [`subject`].
        examples: Questions. Where the tokenizer begins texts with a token of its own, so do they; and where nothing
            comes before an answer.
        context (`int`, *optional*): Tokens that the model reads at once; prompts that are longer lose their beginning.
        batch_size, padding_side, tick: As for [`score`].

    Returns:
        `dict`: `accuracy`, by the probability of the whole choice; `accuracy_normalized`, by its mean logarithm per
        character, not counting the space it begins with, which does not favour short choices; `chance`, the accuracy
        of guessing; `examples`; `samples`, whether each was right, both ways; `protocol`.

    Raises:
        ValueError: if there is no example, or a choice alone is longer than the context.
    """
    measured = subject(model, tokenizer)
    context = measured.context(context)
    if not examples:
        raise ValueError("`examples` must hold at least one question, got none.")
    pairs = [(each.prompt, choice) for each in examples for choice in each.choices]
    scores = iter(_score(measured, pairs, context, batch_size, padding_side, tick))
    right, right_normalized = [], []
    for each in examples:
        sums = [-float(next(scores).losses.sum()) for _ in each.choices]
        means = [
            value / (len(choice.lstrip()) or len(choice)) for value, choice in zip(sums, each.choices, strict=True)
        ]
        right.append(_largest(sums) == each.answer)
        right_normalized.append(_largest(means) == each.answer)
    return {
        "accuracy": sum(right) / len(right),
        "accuracy_normalized": sum(right_normalized) / len(right),
        "chance": sum(1 / len(each.choices) for each in examples) / len(examples),
        "examples": len(examples),
        "samples": {"accuracy": right, "accuracy_normalized": right_normalized},
        "protocol": {"context": context, "normalized_by": "characters", "truncated": "left"},
    }


def cloze_accuracy(
    model: Any,
    examples: Sequence[Cloze],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    batch_size: int = 8,
    padding_side: Side = "right",
    tick: Tick = no_tick,
) -> dict[str, Any]:
    """
    How often a model would end a text as it ends, token by token the likeliest (as LAMBADA is scored).

    Args:
        model, tokenizer: As for [`subject`].
        examples: Texts and their ends.
        context, batch_size, padding_side, tick: As for [`multiple_choice_accuracy`].

    Returns:
        `dict`: `accuracy`; `target_perplexity`, the exponential of the mean over examples of minus the logarithm of
        the probability of the whole end; `examples`; `samples`: per example whether it was right, and the nats;
        `protocol`.

    Raises:
        ValueError: as [`multiple_choice_accuracy`].
    """
    measured = subject(model, tokenizer)
    context = measured.context(context)
    if not examples:
        raise ValueError("`examples` must hold at least one text, got none.")
    pairs = [(each.prompt, each.target) for each in examples]
    scores = _score(measured, pairs, context, batch_size, padding_side, tick)
    right = [bool(each.greedy.all()) for each in scores]
    nats = [float(each.losses.sum()) for each in scores]
    return {
        "accuracy": sum(right) / len(right),
        "target_perplexity": exponential(math.fsum(nats) / len(nats)),
        "examples": len(examples),
        "samples": {"accuracy": right, "nats": nats},
        "protocol": {"context": context, "truncated": "left"},
    }


def _score(
    measured: Subject, pairs: list[tuple[str, str]], context: int, batch_size: int, padding_side: Side, tick: Tick
) -> list[Score]:
    windows = [_window(measured, prompt, ending, context) for prompt, ending in pairs]
    return list(score(measured, windows, batch_size=batch_size, padding_side=padding_side, tick=tick))


def _window(measured: Subject, prompt: str, ending: str, context: int) -> Window:
    """
    The tokens of both texts as one, of which those of the ending are asked for.

    Tokenizers merge across the joint, so both are encoded together; a space that the prompt ends with belongs to the
    first word of the ending, as in running text.
    """
    kept = prompt.rstrip()
    ending, prompt = prompt[len(kept) :] + ending, kept
    together = measured.encode([prompt + ending], "examples")[0]
    before = len(measured.encode([prompt], "examples")[0]) if prompt else 0
    if measured.begins_texts or not before:
        # As the model was trained, or because something must be read before the first token that is asked for.
        together, before = [beginning(measured), *together], before + 1
    targets = together[before:]
    if not targets:
        raise ValueError(f"`examples` must end in a token of their own, got {ending!r} after {prompt[-40:]!r}.")
    if len(targets) > context:
        raise ValueError(f"`context` must hold a whole ending of {len(targets)} tokens, got {context}.")
    return Window(together[:-1][-context:], targets)


def _largest(values: list[float]) -> int:
    """Index of the largest, the first of those that tie."""
    return max(range(len(values)), key=values.__getitem__)
