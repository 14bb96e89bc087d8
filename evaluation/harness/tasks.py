"""How a measure is called for a task of a suite, and what is said where it does not apply."""

import inspect
from collections.abc import Mapping
from typing import Any

from ..likelihood import Progress, no_progress
from ..measure import NotApplicable
from ..measures import MEASURES
from ..measures.quantization_robustness import Memoize, unkept
from ..models import EvaluatedModel
from .suites import Task
from .texts import Texts


def measure(
    task: Task,
    model: EvaluatedModel,
    texts: Texts,
    batch_size: int,
    progress: Progress = no_progress,
    memoize: Memoize = unkept,
) -> dict[str, Any]:
    """
    One task for one model.

    Args:
        task, model, texts: What is measured.
        batch_size: Rows that go through the model at once.
        progress: Called with the number of windows that went through it.
        memoize: Called with the parts of what takes long.

    Returns:
        `dict`: What the measure gives; and where part of it does not apply to this model, `absent`: the reason of
        each, by what is absent.

    Raises:
        NotApplicable: if the measure says nothing about such a model.
        ValueError: if it needs what the texts or the model do not have, or an argument is impossible.
    """
    record = MEASURES[task.metric]
    inputs = record.needs(model, texts, task)
    own = {"batch_size": batch_size, "progress": progress, "memoize": memoize}
    taken = {name: value for name, value in own.items() if name in inspect.signature(record.run).parameters}
    result = record.run(model, inputs.data, **taken, **inputs.arguments)
    return result | ({"absent": inputs.absent} if inputs.absent else {})


def measure_together(
    task: Task, models: Mapping[str, EvaluatedModel], progress: Progress = no_progress
) -> dict[str, Any]:
    """
    A task that models take turns in.

    Returns:
        `dict`: What the measure gives of the models that can take part; `absent`: the reason of each other one, if
        any.

    Raises:
        NotApplicable: if none can.
    """
    record = MEASURES[task.metric]
    able, absent = {}, {}
    for name, each in models.items():
        try:
            record.needs(each, None, task)
            able[name] = each
        except NotApplicable as reason:
            absent[name] = str(reason)
    if not able:
        raise NotApplicable(next(iter(absent.values())))
    return record.run(able, progress=progress, **task.arguments) | ({"absent": absent} if absent else {})
