"""What a suite may say about a metric: the arguments that it takes, and which values fit a type."""

import collections.abc
import inspect
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..measures.accuracy import cloze_accuracy, multiple_choice_accuracy
from ..measures.invariance import invariance
from ..measures.outliers import outliers
from ..measures.perplexity import perplexity
from ..measures.quantization import quantization_robustness
from ..measures.throughput import throughput


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "perplexity": perplexity,
    "cloze": cloze_accuracy,
    "multiple_choice": multiple_choice_accuracy,
    "invariance": invariance,
    "outliers": outliers,
    "quantization_robustness": quantization_robustness,
    "throughput": throughput,
}
# What the harness itself passes on.
OWN = ("tick", "once", "batch_size")
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "names with values",
    type(None): "null",
}


@cache
def arguments_of(metric: str) -> dict[str, tuple[Any, Any]]:
    """Arguments of a metric that a suite may set: by name, the type and the default."""
    measure = MEASURES[metric]
    hints = get_type_hints(measure)
    # The rows of `throughput` are part of what is measured; of the others they change nothing.
    own = OWN[:2] if metric == "throughput" else OWN
    return {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(measure).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in own
    }


def check_arguments(metric: str, task: str, values: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if the metric does not take an argument, or not such a value.
    """
    known = arguments_of(metric)
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"`arguments` of {task} must be among {', '.join(known)}, got {name!r}. Correct the suite."
            )
        kind, default = known[name]
        check_type(name, task, value, kind)
        # Nothing measured is no measurement; where the default is empty, it means something.
        if value == [] and default != ():
            raise ValueError(f"`{name}` of {task} must hold at least one, got []. Name one, or leave it out.")


def check_type(name: str, where: str, value: Any, kind: Any) -> None:
    """
    Raises:
        ValueError: if a value of a suite is not of its type.
    """
    if fits(value, kind):
        return
    # Hashes of digits, dates and words such as no are something else in YAML.
    advice = "Put it in quotes" if str in members(kind) and value is not None else "Correct the suite, or leave it out"
    if isinstance(value, list | dict) or (isinstance(value, str) and str not in members(kind)):
        advice = "Correct the suite, or leave it out"
    raise ValueError(f"`{name}` of {where} must be {described(kind)}, got {value!r}. {advice}.")


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of anything else itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value as YAML gives it is of a type; true and false are no numbers, and text is no list."""
    if kind is Any:
        return True
    if len(members(kind)) > 1:
        return any(fits(value, each) for each in members(kind))
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (list, tuple, Sequence, collections.abc.Sequence):
        return isinstance(value, list) and all(fits(each, get_args(kind)[0]) for each in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def described(kind: Any) -> str:
    """A type in words."""
    if len(members(kind)) > 1:
        return " or ".join(described(each) for each in members(kind))
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if origin in (list, tuple, Sequence, collections.abc.Sequence):
        return f"a list, each {described(get_args(kind)[0])}"
    return NAMES.get(origin or kind, str(kind))
