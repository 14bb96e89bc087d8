"""Task files of a person's own for `lm-eval`, which are data: the library would run code that such files name."""

import re
from pathlib import Path
from typing import Any

import yaml


# Keys of a task or group whose values are data; the library calls what it finds under some of the others.
KEYS = {
    *("task", "group", "tag", "task_alias", "group_alias", "metadata", "description", "num_fewshot", "repeats"),
    *("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"),
    *("fewshot_split", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter"),
    *("fewshot_delimiter", "generation_kwargs", "metric_list", "aggregate_metric_list", "should_decontaminate"),
    "doc_to_decontamination_query",
}
# Readers of data files; a folder, or a data set of the Hub, may hold anything.
READERS = ("json", "csv", "parquet", "text")
READER_KEYS = {"data_files", "data_dir", "field", "delimiter", "sep"}
METRIC_KEYS = {"metric", "aggregation", "higher_is_better", "weight_by_size", "ignore_case", "ignore_punctuation"}
# A template is a program; the name of a column in one is a place for its value.
PLACE = re.compile(r"(?<!\{)\{\{ *\w+(\[\d+\])? *\}\}(?!\})")
PROGRAM = re.compile(r"\{[{%#]")


def check_task_files(folder: Path) -> None:
    """A `ValueError` if a task file in a folder is anything but data."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            _check(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(
                f"`include_path` must hold task files that are data, since no code of a folder is run, got "
                f"{str(path)!r}: {' '.join(str(error).split())[:200]} Write the task without it, or move the file."
            ) from error


def _check(task: Any) -> None:
    from lm_eval.api import metrics, registry  # noqa: F401  metrics register themselves

    if not isinstance(task, dict):
        raise ValueError("it is no mapping.")
    _allow("key", task, KEYS)
    if "dataset_path" in task:
        _allow("`dataset_path`", [task["dataset_path"]], READERS)
    _allow("key of `dataset_kwargs`", task.get("dataset_kwargs") or {}, READER_KEYS)
    for metric in [*(task.get("metric_list") or ()), *(task.get("aggregate_metric_list") or ())]:
        _allow("key of a metric", metric, METRIC_KEYS)
        # The library would load any other from a folder of that name, as code.
        _allow("metric", [metric["metric"]], set(registry.METRIC_REGISTRY.keys()))
        if not isinstance(metric.get("aggregation", ""), str):
            raise ValueError("an aggregation must be a name.")
    members = task.get("task", "")
    if not all(isinstance(name, str) for name in (members if isinstance(members, list) else [members])):
        raise ValueError("tasks of a group must be names.")
    for text in _texts(task):
        if PROGRAM.search(PLACE.sub("", text)):
            raise ValueError(f"a template may have only columns such as {{{{question}}}}, got {text[:80]!r}.")


def _allow(what: str, given: Any, known: Any) -> None:
    if strange := [str(one) for one in given if not isinstance(one, str) or one not in known]:
        raise ValueError(f"the {what} {strange[0][:80]!r} is none of {', '.join(sorted(known)[:40])}.")


def _texts(value: Any) -> list[str]:
    """All texts in a value of YAML."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []
