"""Pictures of results, as SVG that stands in a page."""

import hashlib
import io
import math
import re
import textwrap
from typing import Any

from markupsafe import escape

from rigpt_hf.pictures.style import Figure

from ..drawing import LETTERS, draw_intervals, has_interval
from .tables import measure_of


# The model, and the baseline in grey: distinct for everybody, and neither is a colour that means better or worse.
COLOURS = ("#0072B2", "#868686")
# Inches of a line of a legend.
LINE = 0.19
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # A model's name may have a dollar in it.
    "text.parse_math": False,
}


def explain(picture: Figure, models: int) -> None:
    """One legend for all axes, outside of them: nothing that was measured lies beneath it; a column for each model."""
    handles = {
        label: handle
        for axes in reversed(picture.axes)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if not handles:
        return
    first = [label for label in picture.axes[0].get_legend_handles_labels()[1] if label in handles]
    labels = list(dict.fromkeys([*first, *handles]))
    fitting = LETTERS // (max(map(len, labels)) + 8)
    columns = models if 1 < models <= fitting < len(labels) else max(1, min(fitting, len(labels)))
    wrapped = ["\n".join(textwrap.wrap(label, LETTERS)) for label in labels]
    lines = math.ceil(len(labels) / columns) * max(1 + label.count("\n") for label in wrapped)
    # The picture grows, so that what was measured keeps its room.
    picture.set_figheight(picture.get_figheight() + LINE * (lines + 1))
    picture.legend([handles[label] for label in labels], wrapped, loc="outside upper left", ncols=columns)


def drawn(task: dict[str, Any], models: list[str]) -> tuple[str, str, Figure] | None:
    """
    The picture of one task: its title, what it says in words, and itself; `None` where there is nothing to draw.

    Args:
        task (`dict`): An entry of the results.
        models (`list[str]`): All models of the results, so that each has its colour in all pictures.
    """
    colours = dict(zip(models, COLOURS, strict=False))
    names = {name: colours[name] for name in task["models"]}
    measure = measure_of(task)
    if not names or (measure.draw is draw_intervals and not any(map(has_interval, task["quantities"]))):
        return None
    import matplotlib as mpl
    import matplotlib.figure

    with mpl.rc_context(STYLE):
        picture = mpl.figure.Figure(layout="constrained")
        words = measure.draw(picture, task, names)
        explain(picture, len(names))
    return measure.picture, words, picture


def figure(task: dict[str, Any], models: list[str]) -> tuple[str, str] | None:
    """The title and the SVG of [`drawn`], as wide as where it stands."""
    made = drawn(task, models)
    if made is None:
        return None
    import matplotlib as mpl

    title, words, picture = made
    buffer = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": task["task"]}):
        # None of what a file says about itself, such as when it was made.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.savefig(buffer, format="svg", metadata=nothing)
    # Only the element itself: declarations of a file have no place inside of a page.
    opening, rest = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL).split(">", 1)
    label = escape(f"{task['task']}: {title}")
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    opening += f' width="100%" role="img" aria-label="{label}"><title>{label}</title><desc>{escape(words)}</desc>'
    # Several stand in one page, in which a name is given once.
    prefix = f"p{hashlib.sha256(task['task'].encode()).hexdigest()[:8]}-"
    return title, opening + re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", rest)
