"""The results of an evaluation: the data behind table and report, and how it is written."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rigpt_hf import __version__
from rigpt_hf.checkpoints.certificate import library_versions
from rigpt_hf.checkpoints.dequantized import dtype_in_words, numbers_of
from rigpt_hf.checkpoints.folder import Seen, begin_record, check_ours, new_file
from rigpt_hf.checkpoints.source import names_of
from rigpt_hf.checkpoints.written import WRITTEN, inventory

from ..likelihood import exponential
from ..measure import Measure, Quantity
from ..models import EvaluatedModel
from .cache import code_fingerprint
from .standard_tasks import MEASURE as STANDARD
from .statistics import LEVEL, RESAMPLES, Difference, holm, paired_difference, paired_ratio, ratio_interval
from .suites import Suite
from .tables import measure_of, tested
from .texts import Texts


# Raised when a reader of older results would misread newer ones.
SCHEMA = 1
# The files that an evaluation leaves in its folder.
RESULTS, TABLE, REPORT = "results.json", "table.md", "report.html"
MADE_HERE = {RESULTS, TABLE, REPORT, "cache", WRITTEN}
# Difference that is arithmetic, relative to the numbers that were computed: what float32 leaves of two ways to compute
# the same. Of an increase of the loss these are the losses.
ROUNDING = 1e-5
# Parts of a result that tests need, too long to keep.
LONG = ("samples", "values")
# Folders of a checkout that hold what a number may depend on.
CODE = ("rigpt_hf", "evaluation", "training", "model_cards")


def build(
    options: Any,
    suite: Suite,
    texts: Texts,
    models: dict[str, EvaluatedModel],
    hashes: dict[str, str],
    jobs: list[Any],
    found: dict[str, dict[str, Any] | None],
    errors: dict[str, str],
) -> dict[str, Any]:
    """
    The results, as JSON holds them.

    Args:
        options, suite, texts, models: What was asked for.
        hashes: Of every model.
        jobs: All measurements.
        found: What each gave, by its key; `None` for those that failed.
        errors: A line for each of those.
    """
    tasks: list[dict[str, Any]] = []
    for name in dict.fromkeys(job.task for job in jobs):
        task = next((task for task in suite.tasks if task.name == name), None)
        entry: dict[str, Any] = {"task": name, "metric": task.metric if task else STANDARD.name, "models": {}}
        entry |= {"errors": {}, "absent": []}
        if task:
            entry["arguments"] = task.arguments
        measure = measure_of(entry)
        per_model: dict[str, dict[str, Any]] = {}
        for job in (job for job in jobs if job.task == name):
            result = found[job.key]
            if result is None:
                entry["errors"] |= dict.fromkeys(job.models, errors.get(job.key, "not measured"))
            elif "not applicable" in result:
                entry["absent"] += [_absent(model, "", result["not applicable"]) for model in job.models]
            elif measure.together:
                for index, model in enumerate(job.models):
                    if str(index) in result.get("absent", {}):
                        entry["absent"].append(_absent(model, "", result["absent"][str(index)]))
                        continue
                    per_model[model] = result["models"][str(index)] | {"protocol": result["protocol"]}
                    per_model[model]["ratios"] = result["ratios"].get(str(index), {})
            else:
                (model,) = job.models
                entry["absent"] += [_absent(model, *part) for part in result.get("absent", {}).items()]
                per_model[model] = {key: value for key, value in result.items() if key != "absent"}
        entry["models"] = {model: without_long(result) for model, result in per_model.items()}
        entry["quantities"] = _compared(measure, per_model, list(models))
        tasks.append(entry)
    _correct(tasks)
    sources = names_of([model.source for model in models.values()])
    results = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"rigpt_hf": __version__, "commit": commit(), "sha256": code_fingerprint()},
        "versions": library_versions(),
        "hardware": hardware(next(iter(models.values())).device),
        "suite": {
            "name": suite.name,
            "description": suite.description,
            "fraction": suite.fraction,
            "text": texts.source,
        },
        "batch_size": options.batch_size,
        "statistics": {"level": LEVEL, "resamples": RESAMPLES, "correction": "Holm, over all differences"},
        "models": {
            # Where a model lies on this machine is nobody's business.
            name: _model(model, hashes[name], source)
            for (name, model), source in zip(models.items(), sources, strict=True)
        },
        "baseline": list(models)[1] if len(models) > 1 else None,
        "tasks": tasks,
    }
    return without_long(results)


def _absent(model: str, what: str, reason: str) -> dict[str, str]:
    """An entry for a part of a task, or all of it if not named, that says nothing about a model."""
    return {"model": model, "what": what, "reason": reason}


def _model(model: EvaluatedModel, digest: str, source: str) -> dict[str, Any]:
    config = model.model.config
    return {
        "source": source,
        "type": config.model_type,
        "parameters": numbers_of(model.model),
        "dtype": dtype_in_words(model.model),
        "sha256": digest,
        "tokenizer": None if model.tokenizer is None else len(model.tokenizer),
    }


def _compared(measure: Measure, results: dict[str, dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The numbers of all models beside each other, with intervals, and differences to the baseline with tests."""
    listed = {name: measure.quantities(results[name]) if name in results else [] for name in names}
    labels = dict.fromkeys((own.name, own.unit, own.better) for name in names for own in listed[name])
    entries = []
    for label, unit, better in labels:
        own = {name: next((q for q in listed[name] if q.name == label), None) for name in names}
        entry: dict[str, Any] = {"name": label, "unit": unit, "better": better}
        entry["models"] = {name: _value(quantity) for name, quantity in own.items() if quantity is not None}
        match list(own.values()):
            case [Quantity() as model, Quantity() as baseline, *_] if difference := _difference(model, baseline):
                entry["difference"] = difference[0].to_dict() | {"kind": difference[1]}
        entries.append(entry)
    return entries


def _value(quantity: Quantity) -> dict[str, Any]:
    entry = {"value": finite(quantity.value)}
    if quantity.scale is not None:
        entry["scale"] = finite(quantity.scale)
    if quantity.amounts is None or quantity.weights is None or len(quantity.amounts) < 2:
        return entry
    interval = ratio_interval(quantity.amounts, quantity.weights)
    value = exponential if quantity.is_exponential else float
    return entry | {"low": finite(value(interval.low)), "high": finite(value(interval.high))}


def _difference(model: Quantity, baseline: Quantity) -> tuple[Difference, str] | None:
    """The difference, and whether it is a difference or a ratio; `None` where nothing can be tested."""
    if model.ratios is not None and len(model.ratios) > 2:
        # Times become speeds, so that more is faster for all of them.
        return paired_ratio(model.ratios), "ratio of speeds"
    if model.amounts is None or baseline.amounts is None or model.weights is None or baseline.weights is None:
        return None
    if len(model.amounts) != len(baseline.amounts) or model.weights != baseline.weights:
        return None  # other tokens: a mean over them is another thing
    if len(model.amounts) < 2 or model.is_exponential:
        return None
    return paired_difference(model.amounts, baseline.amounts, model.weights), "difference"


def _correct(tasks: list[dict[str, Any]]) -> None:
    """Say which differences hold when all of the run are looked at together."""
    for _, quantity, significant in significances(tasks):
        quantity["difference"]["significant"] = significant


def significances(tasks: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], bool]]:
    """All differences, each behind its task and before whether it holds when all of the run are looked at together."""
    compared = tested(tasks)
    p_values = [quantity["difference"]["p_value"] for _, quantity in compared]
    holds = holm([math.nan if each is None else each for each in p_values])
    return [
        (task, quantity, holding and not _is_rounding(quantity))
        for (task, quantity), holding in zip(compared, holds, strict=True)
    ]


def _is_rounding(quantity: dict[str, Any]) -> bool:
    """Whether two numbers are one up to arithmetic, which may err to the same side on every example."""
    if quantity["difference"]["kind"] != "difference" or quantity["difference"]["value"] is None:
        return False
    entries = quantity["models"].values()
    size = max((abs(entry.get("scale", entry["value"]) or 0.0) for entry in entries), default=0.0)
    return abs(quantity["difference"]["value"]) <= ROUNDING * size


def without_long(value: Any) -> Any:
    """A result without what was kept for the tests only."""
    if isinstance(value, dict):
        return {key: without_long(part) for key, part in value.items() if key not in LONG}
    return [without_long(part) for part in value] if isinstance(value, list) else finite(value)


def finite(value: Any) -> Any:
    """A number that JSON has, or `None`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the device that measure."""
    about: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": processor(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def processor() -> str | None:
    """The name of the machine's processor, where the system says it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        match = None
    return match[1].strip() if match else platform.processor() or None


def commit(here: Path = Path(__file__)) -> str | None:
    """
    The commit that is checked out where this code lies, `+` where tracked files of the code differ from it; `None` if
    this is no checkout.

    Args:
        here (`Path`): A file of the code.
    """
    if shutil.which("git") is None:
        return None

    def git(folder: Path, *arguments: str) -> str | None:
        # Reading must leave nothing behind, not even a refreshed index.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that is installed inside somebody's repository is no part of it.
    if git(here.parent, "ls-files", "--error-unmatch", "--", here.name) is None:
        return None
    top, head = git(here.parent, "rev-parse", "--show-toplevel"), git(here.parent, "rev-parse", "--short", "HEAD")
    if not top or not head:
        return None
    changed = git(Path(top), "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return head + ("" if changed == "" else "+")


def as_json(results: dict[str, Any]) -> str:
    """The numbers as the text of a file."""
    return json.dumps(results, indent=2, allow_nan=False) + "\n"


def check_files(output: Path) -> Seen:
    """
    A `ValueError` if one of the three files is there and is not this program's, or was changed; gives the stamps of
    those that are there.
    """
    there = inventory(output)
    there = {name: there[name] for name in (RESULTS, TABLE, REPORT, WRITTEN) if name in there}
    check_ours(output, "output", there)
    return there


def write(results: dict[str, Any], output: Path, seen: Seen) -> None:
    """
    The three files, each whole or not at all; what was there of an earlier run stays until then.

    Args:
        results (`dict`): As of [`build`].
        output (`Path`): The folder.
        seen (`dict`): What [`check_files`] gave before the work began: what is replaced, and nothing else.

    Raises:
        ValueError: if something has appeared or changed meanwhile; it is left.
    """
    from .report import as_html
    from .tables import as_markdown

    output.mkdir(parents=True, exist_ok=True)
    if (there := check_files(output)) != seen:
        name = next(name for name in (RESULTS, TABLE, REPORT) if there.get(name) != seen.get(name))
        raise ValueError(
            f"`output` must stay as it is while this runs, got {str(output)!r} with {name}, which has appeared or "
            "changed meanwhile and was left. What was measured is kept: run it again, or name another folder."
        )
    begin_record(output)
    # Numbers first: should a picture fail, they are kept.
    for name, as_text in ((RESULTS, as_json), (TABLE, as_markdown), (REPORT, as_html)):
        with new_file(output / name, seen=seen.get(name), named=True) as temporary:
            temporary.write_text(as_text(results), encoding="utf-8")


def failures(results: dict[str, Any]) -> list[str]:
    """A line for every measurement that failed."""
    return [f"{task['task']}, {model}: {line}" for task in results["tasks"] for model, line in task["errors"].items()]
