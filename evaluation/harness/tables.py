"""Results as people read them: numbers with the digits that mean something, and one word for every difference."""

from typing import Any

from rich.table import Column, Table
from rich.text import Text

from rigpt_hf.text.markup import literal

from ..measure import Measure
from ..measures import MEASURES
from ..numbers import number
from .standard_tasks import MEASURE as STANDARD


def measure_of(task: dict[str, Any]) -> Measure:
    """The measure of a task in the results."""
    return STANDARD if task["metric"] == STANDARD.name else MEASURES[task["metric"]]


def tested(tasks: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """All quantities with a difference to the baseline, each behind its task."""
    return [(task, quantity) for task in tasks for quantity in task["quantities"] if "difference" in quantity]


def with_interval(entry: dict[str, Any] | None, unit: str = "") -> str:
    """A value, and its interval where it has one."""
    if entry is None:
        return "–"
    text = number(entry["value"], unit)
    if "low" in entry and entry["low"] is not None:
        text += f" ({number(entry['low'], unit)} to {number(entry['high'], unit)})"
    return text


def verdict(quantity: dict[str, Any]) -> str:
    """
    The worth of the difference to the baseline: `"better"`, `"worse"`, `"no difference shown"`, or nothing where
    nothing was tested.
    """
    difference = quantity.get("difference")
    if difference is None or difference["value"] is None:
        return ""
    if not difference["significant"]:
        return "no difference shown"
    is_ratio = difference["kind"] != "difference"
    more = difference["value"] > (1 if is_ratio else 0)
    if not is_ratio and not quantity["better"]:
        return "more" if more else "less"
    # A ratio of speeds is better when it is more, whatever its unit.
    return "better" if more is (is_ratio or quantity["better"] == "more") else "worse"


def difference_text(quantity: dict[str, Any]) -> str:
    """A difference or ratio with its interval; nothing where nothing was tested."""
    difference = quantity.get("difference")
    if difference is None:
        return ""
    low, high = number(difference["low"]), number(difference["high"])
    if difference["kind"] != "difference":
        return f"× {number(difference['value'])} ({low} to {high})"
    value = difference["value"]
    return f"{'–' if value is None else format(value, '+.4g')} ({low} to {high})"


def converted(task: dict[str, Any], quantity: dict[str, Any]) -> list[str]:
    """Models whose number here is that of their conversion, as only a RiGPT has other frames than its own."""
    if not measure_of(task).of_conversion(quantity["name"]):
        return []
    return [
        name
        for name in quantity["models"]
        if task["models"].get(name, {}).get("protocol", {}).get("converted") is True
    ]


def quantity_text(task: dict[str, Any], quantity: dict[str, Any]) -> str:
    """The name of a quantity, and the models whose number is that of their conversion."""
    words, names = measure_of(task).words(quantity["name"]), converted(task, quantity)
    return f"{words} ({' and '.join(names)}, converted)" if names else words


def notes(results: dict[str, Any]) -> list[str]:
    """The notes under a table of these results, once for each measure that has numbers in it."""
    measures = [measure_of(task) for task in results["tasks"] if task["quantities"]]
    return list(dict.fromkeys(measure.note for measure in measures if measure.note))


def none_right(task: dict[str, Any]) -> str:
    """A line for questions of which no model answered one, whose shares say nothing more; nothing elsewhere."""
    of_share = [each for each in task["quantities"] if measure_of(task).difference_in(each) == "points"]
    values = [entry["value"] for quantity in of_share for entry in quantity["models"].values()]
    if not values or len(of_share) < len(task["quantities"]) or any(value != 0 for value in values):
        return ""
    counts = {result.get("examples") for result in task["models"].values()}
    return f"none of {counts.pop()} right" if len(counts) == 1 and None not in counts else "none right"


def not_applicable(task: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The parts of a task that say nothing about a model: the model, the part (all if not named), the reason."""
    return [(each["model"], each["what"], each["reason"]) for each in task.get("absent", [])]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: task, quantity, unit, every model, difference, verdict."""
    names = list(results["models"])
    listed = []
    for task in results["tasks"]:
        for quantity in task["quantities"]:
            values = [with_interval(quantity["models"].get(name), quantity["unit"]) for name in names]
            compared = [difference_text(quantity), verdict(quantity)] if len(names) > 1 else []
            listed.append([task["task"], quantity_text(task, quantity), quantity["unit"], *values, *compared])
        lines = [(model, what, f"not applicable: {reason}") for model, what, reason in not_applicable(task)]
        lines += [(model, "", f"failed: {line}") for model, line in task["errors"].items()]
        for model, what, line in lines:
            values = [line if name == model else "–" for name in names]
            listed.append([task["task"], what, "", *values, *([""] * (2 if len(names) > 1 else 0))])
    return listed


def on_terminal(results: dict[str, Any]) -> Table:
    """The same for 80 columns: a heading for each task, and no intervals. A number is never cut, words are folded."""
    names, compared = list(results["models"]), ["difference", "worth"] if len(results["models"]) > 1 else []
    body: list[list[Text]] = []
    for task in results["tasks"]:
        body += [[], [Text(task["task"], "bold")]]
        nothing = none_right(task)
        body += [[Text(nothing)]] if nothing else []
        for quantity in [] if nothing else task["quantities"]:
            entries = [quantity["models"].get(name) for name in names]
            values = ["–" if entry is None else number(entry["value"], quantity["unit"]) for entry in entries]
            told = [difference_text(quantity).partition(" (")[0], verdict(quantity)] if compared else []
            called = ", ".join(filter(None, (quantity_text(task, quantity), quantity["unit"])))
            body.append([*map(Text, (called, *values, *told))])
        lines = [f"not applicable to {model}{what and ', '}{what}: {why}" for model, what, why in not_applicable(task)]
        lines += [f"failed for {model}: {line}" for model, line in task["errors"].items()]
        body += [[Text(line)] for line in lines]
    widths = [max([len(row[place]) for row in body if len(row) > place] or [1]) for place in range(1, len(names) + 2)]
    sized = zip(names, widths[:-1], strict=True)
    columns = [Column(Text(name), width=max(width, 9), overflow="fold") for name, width in sized]
    others = [Column("difference", width=max(widths[-1], 10)), Column("worth", width=13)] if compared else []
    table = Table(Column(overflow="fold"), *columns, *others, box=None, pad_edge=False)
    for row in body:
        table.add_row(*row)
    if said := notes(results):
        table.caption, table.caption_justify = "\n".join(said), "left"
    return table


def header(results: dict[str, Any]) -> list[str]:
    """Names of the columns."""
    names = list(results["models"])
    return ["task", "quantity", "unit", *names, *(["difference", "worth"] if len(names) > 1 else [])]


def description(results: dict[str, Any]) -> str:
    """The suite, the models and the machine, in a sentence or two."""
    text, versions = results["suite"]["text"], results["versions"]
    models = "; ".join(
        f"{name} is {own['source']} ({own['type']}, {own['parameters']:,} parameters, {own['dtype']})"
        for name, own in results["models"].items()
    )
    device = (
        results["hardware"].get("gpu") or f"{results['hardware']['device']}, {results['hardware']['threads']} threads"
    )
    fraction = results["suite"].get("fraction", 1.0)
    part = "" if fraction == 1 else f", a share of {fraction:g} of it,"
    return (
        f"Suite {results['suite']['name']}{part} on {text['documents']} documents of {text['source']}; {models}. "
        f"{device}; torch {versions['torch']}, transformers {versions['transformers']}, rigpt_hf "
        f"{results['code']['rigpt_hf']} ({results['code']['commit'] or 'no commit'})."
    )


FOOTNOTE = (
    "Intervals are at 95 %: bootstrap percentiles over examples, and Wilson's for shares of right answers. A "
    "difference is called one when a paired randomisation test (of speeds: Student's t of paired logarithms) rejects "
    "chance at 5 % after Holm's correction for all differences of the run; numbers without examples, such as "
    "kurtosis, are not tested."
)


def as_markdown(results: dict[str, Any]) -> str:
    """The table for a README or card."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(literal, cells)) + " |"

    columns = header(results)
    table = [line(columns), f"|{' --- |' * len(columns)}", *map(line, rows(results))]
    return "\n".join([literal(description(results)), "", *table, "", *notes(results), FOOTNOTE, ""])
