"""Results as a page that needs nothing else: pictures inside, no scripts, nothing loaded from anywhere."""

from collections import Counter
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .figures import figure
from .overview import overview
from .results import failures
from .standard_tasks import MEASURE as STANDARD
from .tables import (
    FOOTNOTE,
    converted,
    description,
    difference_text,
    measure_of,
    not_applicable,
    quantity_text,
    tested,
    verdict,
    with_interval,
)


TEMPLATE = "report.html.j2"


def as_html(results: dict[str, Any]) -> str:
    """The report."""
    environment = Environment(
        loader=PackageLoader("rigpt_hf.evaluation.harness", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "with_interval": with_interval,
        "verdict": verdict,
        "difference_text": difference_text,
        "quantity_text": quantity_text,
        "not_applicable": not_applicable,
        "heading": heading,
        "measure_of": measure_of,
    }
    environment.filters["apart"] = apart
    differences = tested(results["tasks"])
    # Models of which some number is that of their conversion.
    own = [name for task in results["tasks"] for each in task["quantities"] for name in converted(task, each)]
    pictures = {}
    for task in results["tasks"]:
        drawn = figure(task, list(results["models"]))
        if drawn is not None:
            # Made here from numbers; names in it are escaped where they are drawn.
            pictures[task["task"]] = {"title": drawn[0], "svg": Markup(drawn[1])}
    return environment.get_template(TEMPLATE).render(
        results=results,
        names=list(results["models"]),
        pictures=pictures,
        panels=overview(results),
        headings={task["task"]: heading(task) for task in results["tasks"]},
        converted=list(dict.fromkeys(own)),
        description=description(results),
        footnote=FOOTNOTE,
        failures=failures(results),
        tested=len(differences),
        counts=Counter(verdict(quantity) for _, quantity in differences),
    )


def heading(task: dict[str, Any]) -> str:
    """A task's name as a heading; those of lm-eval are names of its own."""
    name = task["task"]
    return name if measure_of(task) is STANDARD else (name[:1].upper() + name[1:]).replace("_", " ")


def apart(text: str) -> Markup:
    """A number, and its interval below it and smaller."""
    value, bracket, bounds = text.partition(" (")
    return escape(value) + (Markup("<small>{}</small>").format(bounds.removesuffix(")")) if bracket else "")
