"""The record of a measure, from which suites, tables, pictures, report and card read all that they say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rigpt_hf.checkpoints.dequantized import codes_in_words

from .drawing import INTERVALS, draw_intervals
from .models import EvaluatedModel


if TYPE_CHECKING:
    from matplotlib.figure import Figure

Better = Literal["less", "more", ""]
# Several names, as YAML or Python give them.
Names = list[str] | tuple[str, ...]
# Draws the result of a task for models, each with its colour; returns what the picture says in words.
Draw = Callable[["Figure", dict[str, Any], dict[str, str]], str]


class NotApplicable(Exception):
    """A measure says nothing about a model, which is no failure; the message is the reason."""


@dataclass(frozen=True)
class Quantity:
    """
    A number that models are compared by.

    Args:
        name, unit (`str`): What it is.
        value (`float`): Of this model.
        better (`"less"`, `"more"` or `""`): Which of two is better; nothing where that cannot be said.
        amounts, weights (*optional*): Per example; the value is the sum of the former over the sum of the latter, and
            intervals and tests are made of them. Absent for numbers that no repetition would change.
        ratios (*optional*): To the baseline, of repeated measurements side by side.
        scale (`float`, *optional*): Of the numbers that the value was computed from, whose rounding it has; the value
            itself if not given.
        is_exponential (`bool`): Whether the value is the exponential of that ratio of sums. It has an interval then,
            and no test: that of the ratio is listed beside it.
    """

    name: str
    unit: str
    value: float
    better: Better = "less"
    amounts: list[float] | None = None
    weights: list[float] | None = None
    ratios: list[float] | None = None
    scale: float | None = None
    is_exponential: bool = False


@dataclass(frozen=True)
class Inputs:
    """
    The data and arguments of a measure.

    Args:
        data: Texts, rows of token ids, or questions.
        arguments (`dict`): Keyword arguments.
        absent (`dict[str, str]`): Parts that say nothing about this model, and the reason of each.
    """

    data: Any
    arguments: dict[str, Any]
    absent: dict[str, str] = field(default_factory=dict)


def refuse_codes(model: EvaluatedModel) -> None:
    """Raise [`NotApplicable`] for a model whose maps are rounded already and no `nn.Linear`."""
    if words := codes_in_words(model.config):
        raise NotApplicable(f"its weights are {words} already")


def rows_of_task(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
    """The task's share of the texts, and its arguments."""
    return Inputs(texts.rows[: task.documents], dict(task.arguments))


def same_windows(arguments: dict[str, Any], default: int | None, models: list[EvaluatedModel]) -> dict[str, Any]:
    """
    Arguments whose `context` fits into every model, and is the same for all where a suite leaves it to the model.

    Args:
        arguments: Of a task, whose measure has a `context`.
        default: Of `context`, where the task does not say or says null.
        models: All that are measured.
    """
    most = min((each.positions for each in models if each.positions is not None), default=None)
    own = {each.context(None) for each in models}
    # Without a value each model reads as much as it takes, and other windows are another measurement.
    given = arguments.get("context")
    context = default if given is None else given
    if context is None and len(own) > 1:
        arguments = arguments | {"context": min(own)}
    elif most is not None and context is not None and context > most:
        arguments = arguments | {"context": most}
    # A stride follows a context that was lowered; one that the suite's own context forbids is refused.
    stride = arguments.get("stride")
    if arguments.get("context") != context and stride is not None and (context is None or stride <= context):
        arguments = arguments | {"stride": min(stride, arguments["context"])}
    return arguments


@dataclass(frozen=True)
class Measure:
    """
    A measure: each file of `measures/` has one, named `MEASURE`.

    Args:
        name (`str`): What suites call it.
        question (`str`): What it asks, for whoever does not know it.
        run: Called with a model (an [`EvaluatedModel`], or whatever [`evaluated`] takes), the data and keyword
            arguments, which a suite may set; or, `together`, with all models by their names and keyword arguments.
            `batch_size`, `progress` and `memoize` come from the harness, if it takes them.
        quantities: The numbers in the result of one model that models are compared by, with unit and direction.
        picture (`str`), draw: Title of the picture, and what draws it; the intervals of all quantities if not given,
            and then a task without intervals has none.
        needs: Called with a model, the texts and the task; gives the [`Inputs`], or raises [`NotApplicable`].
        fit: Called with a task's arguments, the default of `context` and all models; arguments that fit into all.
        card_words (`str`): What a model card calls it where it was not measured; nothing if cards do not ask for it.
        hub_types (`dict[str, str]`): What the Hub's widgets call its quantities.
        difference_in: How the difference of a quantity (an entry of the results) is told at a glance: in percent of
            the baseline's, in percentage points (of a share near 0 a percentage is absurd), or in its own unit.
        words: What people read for the name of a quantity; the name itself if not given.
        note (`str`): What stands under tables with its numbers, for whoever would misread them.
        of_conversion: Whether a quantity, by its name, is that of a stock model's conversion.
        together (`bool`): Whether models take turns, with the machine to themselves.
    """

    name: str
    question: str
    run: Callable[..., dict[str, Any]]
    quantities: Callable[[dict[str, Any]], list[Quantity]]
    picture: str = INTERVALS
    draw: Draw = draw_intervals
    needs: Callable[[EvaluatedModel, Any, Any], Inputs] = rows_of_task
    fit: Callable[[dict[str, Any], int | None, list[EvaluatedModel]], dict[str, Any]] = same_windows
    card_words: str = ""
    hub_types: Mapping[str, str] = field(default_factory=dict)
    difference_in: Callable[[dict[str, Any]], Literal["percent", "points", "unit"]] = lambda quantity: "percent"
    words: Callable[[str], str] = lambda name: name
    note: str = ""
    of_conversion: Callable[[str], bool] = lambda name: False
    together: bool = False
