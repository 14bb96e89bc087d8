"""Results as a page that needs nothing else: pictures inside, no scripts, nothing loaded from anywhere."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .figures import figure
from .results import failures
from .tables import (
    FOOTNOTE,
    description,
    difference_text,
    not_applicable,
    number,
    quantity_text,
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
        "number": number,
        "with_interval": with_interval,
        "verdict": verdict,
        "difference_text": difference_text,
        "quantity_text": quantity_text,
        "not_applicable": not_applicable,
    }
    pictures = {}
    for task in results["tasks"]:
        drawn = figure(task, list(results["models"]))
        if drawn is not None:
            # Made here from numbers; names in it are escaped by the library that draws.
            pictures[task["task"]] = {"title": drawn[0], "svg": Markup(drawn[1])}
    return environment.get_template(TEMPLATE).render(
        results=results,
        names=list(results["models"]),
        pictures=pictures,
        description=description(results),
        footnote=FOOTNOTE,
        failures=failures(results),
        tested=sum("difference" in each for task in results["tasks"] for each in task["quantities"]),
        counts=counts(results),
    )


def counts(results: dict[str, Any]) -> dict[str, int]:
    """How many differences are of each kind."""
    found: dict[str, int] = {}
    for task in results["tasks"]:
        for quantity in task["quantities"]:
            if word := verdict(quantity):
                found[word] = found.get(word, 0) + 1
    return found
