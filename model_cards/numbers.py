"""Whether the numbers of an evaluation can be measured, and agree with each other and with the model."""

import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from rigpt_hf.evaluation.harness.results import ROUNDING, finite, significances
from rigpt_hf.evaluation.harness.standard_tasks import LESS, SHARES
from rigpt_hf.evaluation.likelihood import exponential
from rigpt_hf.evaluation.measures.invariance import MEASURE as INVARIANCE
from rigpt_hf.evaluation.measures.invariance import largest


# Least values of quantities, by their unit.
LEAST_OF_UNIT = {"per token": 1, "per word": 1, "bits": 0, "relative": 0, "tokens/s": 0, "s": 0, "bytes": 1}
# The same by the first word of the name, where units do not tell. No kurtosis is below that of two values, -2.
LEAST = {"loss": -math.inf, "crest": 1, "excess": -2} | dict.fromkeys(LESS, 1) | {"bits_per_byte": 0}
# A time of 0, or a speed, was not measured.
ABOVE = {"tokens/s", "s"}
# Fields that count something; each holds whole numbers.
COUNTS = {"parameters", "documents", "threads", "cores", "draws", "tokens", "examples", "turns", "texts", "batch_size"}
# Keys of these are names of people's own, or of frames.
NAMED = {"errors", "arguments"}
# Fields that follow from others beside them.
DERIVED: dict[str, Callable[[dict[str, Any]], float]] = {
    "perplexity": lambda own: exponential(own["loss"]),
    "word_perplexity": lambda own: exponential(own["loss"] * own["tokens"] / own["words"]),
    "byte_perplexity": lambda own: exponential(own["loss"] * own["tokens"] / own["bytes"]),
    "bits_per_byte": lambda own: own["loss"] * own["tokens"] / own["bytes"] / math.log(2),
}


def check_numbers(path: Path, results: dict[str, Any], name: str, own: dict[str, Any]) -> None:
    """
    Refuse numbers that no measurement gives, or that contradict each other or the model.

    Args:
        path, results: A results.json, and what it holds.
        name (`str`): Of the model in it.
        own (`dict`): `type`, `parameters` and `dtype` of the model.

    Raises:
        ValueError: names the file, the field, the rule and the value.
    """
    try:
        _check(Refusal(path), results, name, own)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"`results` must be as rigpt evaluate wrote them, got some that cannot be shown: {error!r:.80}. Run it "
            "again."
        ) from error


class Refusal:
    """Refuses what breaks a rule, in one line."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, rule: str, told: str, value: Any) -> NoReturn:
        raise ValueError(
            f"`results` must hold numbers that can be measured, got {value!r:.80} in {str(self.path)!r} as {told:.120}"
            f", which must be {rule}. Run rigpt evaluate again."
        )

    def unless_number(self, value: Any, told: str) -> None:
        """Refuse what is neither a finite number nor nothing."""
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            self("a finite number or null", told, value)

    def unless_close(self, value: Any, right: float | None, told: str, rule: str, size: float | None = None) -> None:
        """Refuse a number that is not the right one, up to rounding of numbers of this size."""
        self.unless_number(value, told)
        right = finite(right)
        if value is None or right is None:
            if value is not right:
                self(f"{rule}, {right}", told, value)
        elif abs(value - right) > ROUNDING * (abs(right) if size is None else size):
            self(f"{rule}, {right:.6g}", told, value)


def _check(refuse: Refusal, results: dict[str, Any], name: str, own: dict[str, Any]) -> None:
    for told, value in _counts(results, ""):
        if type(value) is not int or value < 1:
            refuse("a whole number from 1", told, value)
    names, fraction = list(results["models"]), results.get("suite", {}).get("fraction", 1.0)
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        refuse("above 0 and at most 1", "suite.fraction", fraction)
    for key, value in own.items():
        # Where it is absent nothing can be shown of it.
        found = results["models"][name].get(key, value)
        if found != value or type(found) is not type(value):
            refuse(f"{value}, as of the model", f"models.{name}.{key}", found)
    if results.get("baseline") != (baseline := names[1] if len(names) > 1 else None):
        refuse(f"{baseline}, the second of the models", "baseline", results.get("baseline"))
    seen: set[tuple[str, ...]] = set()
    for task in results["tasks"]:
        listed = [(task["task"],), *((task["task"], quantity["name"]) for quantity in task["quantities"])]
        for which in listed:
            if which in seen:
                refuse("there once", f"a quantity of task {task['task']}" if which[1:] else "a task", which[-1])
            seen.add(which)
        for model, record in task["models"].items():
            _check_record(refuse, record, f"task {task['task']} of {model}")
            if task["metric"] == INVARIANCE.name:
                _check_errors(refuse, record, f"task {task['task']} of {model}")
        for quantity in task["quantities"]:
            _check_quantity(refuse, task, quantity, names)
    for task, quantity, significant in significances(results["tasks"]):
        if quantity["difference"]["significant"] is not significant:
            told = f"significant of the difference of {quantity['name']} in task {task['task']}"
            refuse(f"{significant} by the p-values of the run", told, quantity["difference"]["significant"])


def _counts(value: Any, told: str) -> Iterator[tuple[str, Any]]:
    """Every number that counts something, and where it stands."""
    if isinstance(value, list):
        for part in value:
            yield from _counts(part, told)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key in COUNTS and not isinstance(part, dict):
                yield from ((f"{told}{key}", each) for each in (part if isinstance(part, list) and part else [part]))
            elif key not in NAMED:
                yield from _counts(part, f"{told}{key}.")


def _check_record(refuse: Refusal, record: Any, told: str) -> None:
    """Refuse a field that does not follow from those beside it, in a record or in one inside it."""
    if not isinstance(record, dict):
        return
    for key, derive in DERIVED.items():
        if key in record and isinstance(record.get("loss"), float):
            try:
                right = derive(record)
            except KeyError:
                continue
            refuse.unless_close(record[key], right, f"{key} in {told}", "what the loss beside it gives")
    for part in record.values():
        _check_record(refuse, part, told)


def _check_errors(refuse: Refusal, record: dict[str, Any], told: str) -> None:
    """Refuse gauge errors that are not the largest of what they are said to be the largest of."""
    drawn: dict[str, list[float]] = {}
    for frame, errors in record["errors"].items():
        for dtype, error in errors.items():
            where = f"largest error of {frame} in {dtype}, {told}"
            _check_entry(refuse, {"value": error["largest"]}, where, 0, math.inf)
            mean, most = error["mean"], error["largest"]
            refuse.unless_number(mean, f"mean of the {where}")
            # What overflowed in one draw has neither.
            if mean is not None and (most is None or mean > most + ROUNDING * most):
                refuse(f"at least the mean, {mean:.6g}", where, most)
            drawn.setdefault(dtype, []).append(math.nan if most is None else most)
    for dtype, value in record["largest"].items():
        right = largest(drawn[dtype])
        refuse.unless_close(value, right, f"largest error in {dtype}, {told}", "the largest of all frames")


def _check_quantity(refuse: Refusal, task: dict[str, Any], quantity: dict[str, Any], names: list[str]) -> None:
    stem, unit = re.split(r"[ ,(]", quantity["name"])[0], quantity["unit"]
    told, most = f"{quantity['name']} in task {task['task']}", 1 if stem in SHARES else math.inf
    least = 0 if stem in SHARES or quantity["name"] == "loss" else LEAST.get(stem, LEAST_OF_UNIT.get(unit, -math.inf))
    for model, entry in quantity["models"].items():
        where = f"{told} of {model}"
        _check_entry(refuse, entry, where, least, most)
        if unit in ABOVE and entry["value"] == 0:
            refuse("above 0", where, entry["value"])
        own = _own_values(task["models"][model], quantity["name"])
        if entry["value"] not in own:
            rule = f"{own[0]}, as in" if len(own) == 1 else "a number of"
            refuse(f"{rule} the task's own record of the model", where, entry["value"])
    if "difference" in quantity:
        _check_difference(refuse, quantity, f"difference of {told}", names)


def _own_values(record: dict[str, Any], name: str) -> list[Any]:
    """The value of a quantity in the record of a model; all that are there where it is not called the same."""
    own = record | record.get("metrics", {})
    for key in (name, re.sub("[ ,]+", "_", name)):
        if key in own:
            return [own[key]["median"] if isinstance(own[key], dict) else own[key]]
    return list(_values(record))


def _values(record: Any) -> Iterator[Any]:
    for part in record.values() if isinstance(record, dict) else record:
        if isinstance(part, dict | list):
            yield from _values(part)
        else:
            yield part


def _check_entry(refuse: Refusal, entry: dict[str, Any], told: str, least: float, most: float) -> None:
    """Refuse a value outside its bounds or its interval."""
    value, low, high, scale = (entry.get(key) for key in ("value", "low", "high", "scale"))
    for each in (value, low, high, scale):
        refuse.unless_number(each, told)
    # Bounds and value are computed in different orders.
    slack = ROUNDING * max(abs(each or 0) for each in (value, low, high, scale))
    for each in (value, low, high):
        # Exponentials round too, and percentiles.
        if each is not None and not least - (slack if least else 0) <= each <= most + slack:
            refuse(f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}", told, each)
    ends = [each for each in (low, value, high) if each is not None]
    if any(before > after + slack for before, after in pairwise(ends)):
        refuse(f"in its interval from {low} to {high}", told, value)


def _check_difference(refuse: Refusal, quantity: dict[str, Any], told: str, names: list[str]) -> None:
    """Refuse a difference that is not that of the two values, or a test that is none."""
    difference, p_value = quantity["difference"], quantity["difference"]["p_value"]
    is_ratio = difference["kind"] == "ratio of speeds"
    if not is_ratio and difference["kind"] != "difference":
        refuse("'difference' or 'ratio of speeds'", f"kind of the {told}", difference["kind"])
    _check_entry(refuse, difference, told, 0 if is_ratio else -math.inf, math.inf)
    refuse.unless_number(p_value, f"p_value of the {told}")
    if p_value is not None and not 0 <= p_value <= 1:
        refuse("from 0 to 1", f"p_value of the {told}", p_value)
    model, baseline = (quantity["models"][name] for name in names[:2])
    if not is_ratio:
        size = max(abs(each.get("scale") or each["value"] or 0) for each in (model, baseline))
        # Neither was measured where one was not.
        right = None if None in (model["value"], baseline["value"]) else model["value"] - baseline["value"]
        refuse.unless_close(difference["value"], right, told, "that of the two values", size)
