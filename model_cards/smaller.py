"""The record of how a model was made smaller: what it was made from, how, and what that cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rigpt_hf.pruning.prune import Sizes
from rigpt_hf.quantization import Recipe
from rigpt_hf.text.paths import without_path

from .runs import ImpossibleValue, name_of_source, of_record


@dataclass(frozen=True)
class SmallerMetadata:
    """A record of `rigpt quantize` or `rigpt prune`."""

    record: str
    """Name of the file."""
    source: str
    how: list[str]
    """In words."""
    texts: list[str]
    """Names of the texts that losses are of."""
    losses: list[tuple[str, list[float]]]
    """Names of models, and their losses on each text, nats per token; the first is the model before."""


def smaller_than(folder: Path) -> list[SmallerMetadata]:
    """The records of a folder; a `ValueError` if one cannot be read, or says what none does."""
    words = {"prune.json": _words_of_pruning, "quantize.json": _words_of_recipe}
    found = (of_record(folder / name, partial(_read, name, of_how)) for name, of_how in words.items())
    return [each for each in found if each is not None]


def _read(name: str, words: Callable[[Any], list[str]], record: Any) -> SmallerMetadata:
    losses = record["loss"]
    before, *_ = losses.values()
    texts = list(before)
    rows = [(model, [float(values[text]) for text in texts]) for model, values in losses.items()]
    if len(rows) < 2 or not texts:
        raise ImpossibleValue("`loss` must be of the model before and after.")
    for value in (value for _, values in rows for value in values):
        if not (math.isfinite(value) and value >= 0):
            raise ImpossibleValue(f"`loss` must be finite and at least 0, got {value}.")
    try:
        how = words(record)
    except ValueError as error:
        raise ImpossibleValue(str(error)) from error
    source, calibrated = name_of_source(str(record["source"])), without_path(str(record["calibrate"]))
    return SmallerMetadata(name, source, [*how, f"calibrated on {_texts(calibrated)}"], texts, rows)


def _texts(calibrate: str) -> str:
    known = {"default": "documentation of installed packages", "none": "tokens drawn at random"}
    names = [name.strip() for name in calibrate.split(",") if name.strip()]
    return " and ".join(known.get(name, name) for name in names)


def _words_of_recipe(record: Any) -> list[str]:
    recipe = Recipe(**record["recipe"])
    scale = "a scale for every row" if recipe.group is None else f"a scale for every {recipe.group} weights"
    method = "GPTQ" if recipe.method == "gptq" else "rounding to the nearest"
    frame = "a Hadamard frame" if recipe.frame == "hadamard" else "the model's own frame"
    tuned = [f"{recipe.tune} steps of tuning"] if recipe.tune else []
    return [f"{recipe.bits} bits for each weight, {scale}", f"{method} in {frame}", *tuned, *recipe.simulates]


def _words_of_pruning(record: Any) -> list[str]:
    sizes = Sizes(record["neurons"], record["heads"], record["rank"])
    adapter = record.get("lora") or 0  # which earlier records do not have
    counts = {"heads": sizes.heads, "rank": sizes.rank or 0, "recover": record["recover"], "lora": adapter}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ImpossibleValue(f"`{name}` must be a whole number, at least 0, got {count!r}.")
    if not 0 <= sizes.neurons < 1:
        raise ImpossibleValue(f"`neurons` must be from 0 to below 1, got {sizes.neurons}.")
    parts = {
        f"{sizes.neurons:.0%} of the neurons left out": sizes.neurons,
        f"{sizes.heads} query heads of every layer left out": sizes.heads,
        f"{sizes.rank} dimensions of each head kept": sizes.rank,
        f"{record['recover']} steps of recovery{f' by an adapter of rank {adapter}' if adapter else ''}": record[
            "recover"
        ],
    }
    return [words for words, there in parts.items() if there]
