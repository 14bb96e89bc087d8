"""The record of a pretraining run: what a card says of it, and the values that no run writes."""

import json
import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rigpt_hf.checkpoints.source import TRAINED, in_short, names_of
from rigpt_hf.checkpoints.written import file_sha256, json_sha256, parse_json
from rigpt_hf.dataclass_options import convert
from rigpt_hf.text.paths import without_path
from rigpt_hf.training.options import PretrainOptions, Rule
from rigpt_hf.training.records import LOG, LOG_SHA256, OWNER, SHA256, WEIGHTS, weights_digest


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Raised by files that are absent, no JSON, JSON of another kind, or nested too deep.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
# Options of a run that a card shows.
SHOWN = (
    "global_batch_size",
    "max_steps",
    "context_length",
    "optim",
    "learning_rate",
    "weight_decay",
    "mixed_precision",
    "seed",
)
# Rules for what a log says of a step; a loss that diverged is none that is known.
LOGGED: dict[str, Rule] = {
    "step": ("a whole number from 1", lambda value: type(value) is int and value >= 1),
    "tokens_per_second": ("positive", lambda value: 0 < value < math.inf),
    "validation_loss": ("at least 0", lambda value: not value < 0),
}


class ImpossibleValue(ValueError):
    """A value that no run writes; says which, in a sentence."""


@dataclass(frozen=True)
class TrainingMetadata:
    """The record of a pretraining run."""

    steps: int
    tokens: int
    """Tokens that were trained on, repetitions counted."""
    batch_size: int
    context: int | None
    optimizer: str
    learning_rate: float
    weight_decay: float
    precision: str
    seed: int
    loss: float | None
    """Loss of validation at the end, nats per token."""
    source: str | None
    """Where the text came from."""
    seconds: float | None
    """Seconds that all steps took, without validation and checkpoints."""
    start: str | None
    """The model that the run started from; nothing if from random weights."""
    timed: int | None = None
    """Steps whose speed is in the log, if it is not that of all."""


def training_metadata(folder: Path) -> TrainingMetadata | None:
    """
    From the record that a run left in a model folder; `None` if there is none, one of other weights, or one that
    somebody has changed, or whose log somebody has.

    Raises:
        ValueError: if the record cannot be read.
    """
    if not (folder / OWNER).exists():
        return None
    try:
        record = parse_json((folder / OWNER).read_text(encoding="utf-8"))
        if record[WEIGHTS] != weights_digest(folder):
            return None
        options = _possible(**{name: record[name] for name in SHOWN})
        tokens_per_step = options.global_batch_size * options.context_length
        entries = _log(folder / LOG)
        loss = entries[-1].get("validation_loss") if entries else None
        steps = entries[-1]["step"] if entries else options.max_steps
        seconds = _seconds(entries, tokens_per_step)
        start, source = record["init_from"], record.get("data")
        if not _is_as_written(folder, record):
            logger.warning(f"The card says nothing of the run of {str(folder)!r}: {OWNER} or {LOG} was changed since.")
            return None
        return TrainingMetadata(
            steps=steps,
            tokens=steps * tokens_per_step,
            batch_size=options.global_batch_size,
            context=options.context_length,
            optimizer=options.optim,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            precision=options.mixed_precision,
            seed=options.seed,
            loss=None if loss is None else float(loss),
            source=None if source is None else without_path(str(source)),
            seconds=seconds,
            start=None if start is None else name_of_source(str(start)),
            timed=len(entries) if seconds is not None and len(entries) < steps else None,
        )
    except ImpossibleValue as error:
        raise ValueError(
            f"`folder` must lie in a run whose record a pretraining wrote, got a run.json or metrics.jsonl in "
            f"{str(folder)!r}: {error} Move it elsewhere if no pretraining wrote it."
        ) from error
    except UNREADABLE as error:
        reason = in_short(error).partition(" (")[0]
        found = f"without {error}" if isinstance(error, KeyError) else f"that cannot be read: {reason}"
        raise ValueError(
            f"`folder` must lie in a whole run, got a run.json or metrics.jsonl in {str(folder)!r} {found}. "
            "Move it elsewhere if no pretraining wrote it."
        ) from error


def _is_as_written(folder: Path, record: dict[str, Any]) -> bool:
    signed = {name: value for name, value in record.items() if name != SHA256}
    log = file_sha256(folder / LOG) if (folder / LOG).is_file() else None
    return record.get(SHA256) == json_sha256(signed) and record.get(LOG_SHA256) == log


def _possible(**values: Any) -> PretrainOptions:
    """The options of a run that a card shows, by the rules of the run itself."""
    kinds, options = get_type_hints(PretrainOptions), {}
    for name, value in values.items():
        try:
            options[name] = convert(kinds[name], value)
        except ValueError as error:
            raise ImpossibleValue(f"`{name}`: {error!s:.120}") from error
    try:
        # What is not shown must fit to it, wherever it is read.
        return PretrainOptions(**options, warmup_steps=0, report_to=[])
    except ValueError as error:
        raise ImpossibleValue(str(error)) from error


def _log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log by step; its last line is left out where a run that was killed did not end it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    for entry in entries:
        for name, (rule, holds) in LOGGED.items():
            if name in entry and (type(entry[name]) not in (int, float) or not holds(entry[name])):
                raise ImpossibleValue(f"`{name}` must be {rule}, got {entry[name]!r:.80}.")
    return entries


def _seconds(entries: list[dict[str, Any]], tokens_per_step: int) -> float | None:
    """
    The time of all steps of a log; `None` if it holds none, or they are not in order.

    A run with `logging_steps` writes the speed of some steps only, which stands for those since the one before.
    """
    seconds, before = 0.0, 0
    for entry in entries:
        if entry["step"] <= before:
            return None
        seconds += (entry["step"] - before) * tokens_per_step / entry["tokens_per_second"]
        before = entry["step"]
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def name_of_source(source: str) -> str:
    """
    The name of a model that a record gives by its place: the last part of a path, or the folder around one that is
    called `model`, as after every pretraining; an id on the Hub whole.
    """
    name = without_path(source)
    *before, around, last = ["", "", *re.split(r"[/\\]+", source.rstrip("/\\"))]
    if last != TRAINED:
        return name
    if os.path.exists(source):
        return without_path(names_of([source])[0])
    # A folder that is gone may have lain in a home, whose name is a person's; two parts are those of an id.
    at_home = not any(before) or before[-1] in ("home", "Users")
    return around if name == last and around.strip(".~") and not at_home else name


def of_record(path: Path, read: Callable[[Any], T]) -> T | None:
    """The content of a record beside a model; `None` without one, a `ValueError` if it cannot be read."""
    if not path.exists():
        return None
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except ImpossibleValue as error:
        raise ValueError(
            f"`folder` must have a {path.name} as its program writes it or none, got {str(path)!r}: {error} "
            "Move it elsewhere if it is of something else."
        ) from error
    except UNREADABLE as error:
        raise ValueError(f"`folder` must have a {path.name} that can be read or none, got {str(path)!r}.") from error
