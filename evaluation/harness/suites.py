"""Suites of measurements: YAML files, the packaged ones or anybody's own."""

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from rigpt_hf.dataclass_options import yaml_fault

from ..measures import MEASURES


FOLDER = Path(__file__).parents[1] / "suites"
PACKAGED = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
METRICS = tuple(MEASURES)
# Arguments of measures that the harness itself gives.
OWN = ("progress", "memoize", "batch_size")


@dataclass(frozen=True)
class TextOptions:
    """Where the text comes from."""

    source: str = "docs"
    """`docs` for paragraphs of the installed packages' documentation that `training/pretrain.py` and `rigpt demo`
    leave out; a text, JSONL or parquet file or a folder of them; a file of little-endian uint16 token ids that ends in
    .bin; or a data set on the Hub."""
    documents: int = 128
    """How many documents are read at most; windows of a .bin file. A .txt file is one document unless it has
    `<|endoftext|>` between several; each row of JSONL or parquet is one."""
    split: str = "test"
    """Revision of a data set on the Hub."""
    name: str | None = None
    """Configuration of a data set on the Hub."""
    revision: str | None = None
    """Commit of a data set on the Hub."""
    column: str = "text"
    """Column that holds the text."""
    window: int = 257
    """Token ids in a window of a .bin file."""


@dataclass(frozen=True)
class Task:
    """One measurement of every model."""

    metric: str
    """Which measure."""
    name: str = ""
    """Its name; the measure's if not given."""
    documents: int | None = None
    """How many of the suite's documents are read; all if not given."""
    examples: int = 200
    """Questions that are made of the documents, for `cloze` and `multiple_choice`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the measure."""

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, got {self.metric!r}.")
        if not self.name:
            object.__setattr__(self, "name", self.metric)
        for key, value in (("documents", self.documents), ("examples", self.examples)):
            if value is not None and value < 1:
                raise ValueError(f"`{key}` of {self.name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Suite:
    """A text and the measurements on it."""

    name: str
    text: TextOptions
    tasks: tuple[Task, ...]
    description: str = ""
    fraction: float = 1.0
    """Share of the documents and examples that the file of the suite names."""

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("`tasks` must name at least one measurement, got none.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"`tasks` must have different names, got {twice[0]!r} twice. Give one a `name`.")

    def part(self, fraction: float) -> "Suite":
        """
        The same measurements on a share of the documents and examples, each at least one. Of the text `load_texts`
        takes the share, as it knows how much there is.

        Raises:
            ValueError: if `fraction` is not above 0 and at most 1.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction}.")

        def share(count: int) -> int:
            return math.ceil(fraction * count)

        tasks = tuple(
            replace(
                task,
                documents=None if task.documents is None else share(task.documents),
                examples=share(task.examples),
            )
            for task in self.tasks
        )
        return replace(self, tasks=tasks, fraction=self.fraction * fraction)


def load_suite(name: str) -> Suite:
    """
    A packaged suite, or that of a YAML file.

    Args:
        name (`str`): `"core"`, `"full"` or the path of a file.

    Raises:
        ValueError: if there is no such suite, or something in it is unknown, impossible or of another type.
    """
    path = FOLDER / f"{name}.yaml" if name in PACKAGED else Path(name)
    if not path.is_file():
        raise ValueError(f"`suite` must be one of {', '.join(PACKAGED)} or a YAML file, got {name!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"`suite` must be YAML, got {str(path)!r}: {yaml_fault(error)}. Mend it.") from error
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), list):
        raise ValueError(f"`suite` must hold a list of `tasks`, got {str(path)!r} without one.")
    if unknown := sorted(set(values) - {"description", "text", "tasks"}):
        raise ValueError(f"`suite` must hold description, text and tasks, got {unknown[0]!r} in {str(path)!r}.")
    # A key without a value is nothing said.
    said = {key: value for key, value in values.items() if value is not None}
    text = _made(TextOptions, said.get("text", {}), "text")
    tasks = tuple(_made(Task, each, "tasks") for each in values["tasks"])
    for task in tasks:
        check_arguments(task.metric, task.name, task.arguments)
    check_types({"description": said.get("description", "")}, {"description": str}, "the suite")
    return Suite(path.stem, text, tasks, said.get("description", ""))


def _made(kind: Any, values: Any, where: str) -> Any:
    known = [each.name for each in fields(kind)]
    if not isinstance(values, dict):
        raise ValueError(f"`{where}` must hold {', '.join(known)}, got {values!r}.")
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"`{where}` must hold some of {', '.join(known)}, got {unknown[0]!r}.")
    named = [values[key] for key in ("name", "metric") if kind is Task and isinstance(values.get(key), str)]
    check_types(values, get_type_hints(kind), next(iter(named), f"`{where}`"))
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"`{where}` is incomplete: {error}.") from error


@cache
def arguments_of(metric: str) -> dict[str, tuple[Any, Any]]:
    """Arguments of a measure that a suite may set: by name, the type and the default."""
    record = MEASURES[metric]
    hints = get_type_hints(record.run)
    # The rows of what models take turns in are part of what is measured; of the others they change nothing.
    own = OWN[:2] if record.together else OWN
    return {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(record.run).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in own
    }


def check_arguments(metric: str, task: str, values: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if the measure does not take an argument, or not such a value.
    """
    known = arguments_of(metric)
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"`arguments` of {task} must be among {', '.join(known)}, got {name!r}. Correct the suite."
            )
        # Nothing measured is no measurement; where the default is empty, it means something.
        if value == [] and known[name][1] != ():
            raise ValueError(f"`{name}` of {task} must hold at least one, got []. Name one, or leave it out.")
    check_types(values, {name: kind for name, (kind, _) in known.items()}, task)


def check_types(values: dict[str, Any], hints: dict[str, Any], where: str) -> None:
    """
    Raises:
        ValueError: if a value of a suite is not of its type, as the library checks the fields of configurations.
    """
    schema: Any = TypedDict
    for name, value in values.items():
        try:
            validate_typed_dict(schema("Checked", {name: hints[name]}), {name: value})
        except StrictDataclassFieldValidationError as error:
            kinds = [inspect.formatannotation(kind) for kind in get_args(hints[name]) or (hints[name],)]
            # Hashes of digits, dates and words such as no are something else in YAML.
            is_bare = "str" in kinds and value is not None and not isinstance(value, list | dict)
            advice = "Put it in quotes" if is_bare else "Correct the suite, or leave it out"
            kind = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise ValueError(f"`{name}` of {where} must be {kind}, got {value!r}. {advice}.") from error
