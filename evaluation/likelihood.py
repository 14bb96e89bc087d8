"""How likely a model finds tokens: the one place where windows are cut, padded and scored."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from .models import EvaluatedModel


Side = Literal["left", "right"]
# Called with the number of windows, or turns, that are done.
Progress = Callable[[int], None]


def no_progress(done: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Window:
    """
    A row that goes through the model once.

    Args:
        inputs (`list[int]`): Tokens that the model reads.
        targets (`list[int]`): What is asked for, at the last `len(targets)` of them.
    """

    inputs: list[int]
    targets: list[int]


def rolling_windows(tokens: Sequence[int], context: int, stride: int | None = None) -> Iterator[Window]:
    """
    Windows that ask for every token but the first exactly once.

    The first window reads `context` tokens; each later one goes `stride` tokens further, reads as many tokens before
    its last as there is room for, and asks only for what was not asked before. With `stride=context` (the default)
    windows touch without overlap, which is cheapest; small strides give every token more to go on.

    Args:
        tokens: A row of ids.
        context (`int`): Tokens that the model reads at once.
        stride (`int`, *optional*): How far windows lie apart, at most `context`.

    Raises:
        ValueError: if `stride` is not between 1 and `context`.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"`stride` must lie between 1 and the context of {context}, got {stride}.")
    asked, last = 0, len(tokens) - 1
    while asked < last:
        end = min(asked + (stride if asked else context), last)
        begin = max(0, end - context)
        yield Window(list(tokens[begin:end]), list(tokens[asked + 1 : end + 1]))
        asked = end


@dataclass(frozen=True)
class Score:
    """
    The score of one window.

    Args:
        losses (`torch.Tensor` of shape `[targets]`): Minus the logarithm of each target's probability, float64, nats.
        greedy (`torch.Tensor` of shape `[targets]`): Whether it is the most likely token.
    """

    losses: torch.Tensor
    greedy: torch.Tensor


def score(
    model: EvaluatedModel,
    windows: Iterable[Window],
    *,
    batch_size: int = 8,
    padding_side: Side = "right",
    progress: Progress = no_progress,
) -> Iterator[Score]:
    """
    Score windows, in their order.

    Args:
        model: What scores them.
        windows: What is scored; taken batch by batch, so it may be longer than memory.
        batch_size (`int`, defaults to 8): Windows that go through the model at once.
        padding_side (`"left"` or `"right"`): Where the shorter windows of a batch are filled up; changes nothing but
            rounding.
        progress: Called with the number of windows that were scored.

    Raises:
        ValueError: if `batch_size` or `padding_side` is impossible, or a loss is no finite number.
        torch.OutOfMemoryError: if a batch does not fit; a smaller `batch_size` gives the same numbers.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if padding_side not in ("left", "right"):
        raise ValueError(f"`padding_side` must be 'left' or 'right', got {padding_side!r}.")
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            yield from _score(model, batch, padding_side)
            progress(len(batch))
            batch = []
    if batch:
        yield from _score(model, batch, padding_side)
        progress(len(batch))


@torch.no_grad()
def _score(model: EvaluatedModel, batch: list[Window], side: Side) -> list[Score]:
    length = max(len(window.inputs) for window in batch)
    ids, mask = torch.zeros(2, len(batch), length, dtype=torch.long)
    spans = []
    for row, window in enumerate(batch):
        begin = length - len(window.inputs) if side == "left" else 0
        spans.append(slice(begin + len(window.inputs) - len(window.targets), begin + len(window.inputs)))
        ids[row, begin : begin + len(window.inputs)] = torch.tensor(window.inputs)
        mask[row, begin : begin + len(window.inputs)] = 1
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device)}
    if not bool(mask.all()):
        # Positions count real tokens; those of the padding may be anything that the model has a row for.
        inputs |= {
            "attention_mask": mask.to(model.device),
            "position_ids": (mask.cumsum(-1) - 1).clamp_min(0).to(model.device),
        }
    logits = model.model(**inputs, use_cache=False).logits  # [batch, length, vocabulary]
    scores = []
    for row, (window, span) in enumerate(zip(batch, spans, strict=True)):
        asked = logits[row, span]
        asked = asked if asked.dtype is torch.float64 else asked.float()
        targets = torch.tensor(window.targets, device=asked.device)
        losses = cross_entropy(asked, targets, reduction="none").double().cpu()
        if not bool(losses.isfinite().all()):
            wrong = float(losses[~losses.isfinite()][0])
            raise ValueError(
                f"`model` must give finite losses, got {wrong} from {model.name or 'the model'} in {logits.dtype}. "
                "See whether its weights are finite, or load it with another `dtype`."
            )
        scores.append(Score(losses, (asked.argmax(-1) == targets).cpu()))
    return scores


def first_rows(rows: list[list[int]], context: int, count: int = 4) -> torch.Tensor:
    """
    Token ids `[at most count, at most context]`: rows that are long enough, or the longest if none is.

    Raises:
        ValueError: if no row has two tokens.
    """
    length = min(context, max(map(len, rows)))
    if length < 2:
        raise ValueError(f"`predictions` must hold a text of at least two tokens, got {length}.")
    return torch.tensor([row[:length] for row in rows if len(row) >= length][:count])


def exponential(value: float) -> float:
    """`exp`, infinite where it is too large for a number."""
    return math.inf if value >= 700 else math.exp(value)
