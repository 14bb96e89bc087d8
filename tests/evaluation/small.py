"""A small evaluation: a suite of all metrics but the slow ones, of models that `conftest.py` writes."""

from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from rigpt_hf.evaluation.harness.runner import EvaluateOptions, evaluate
from tests.evaluation.toys import word_tokenizer


WORDS = ["<s>", *[f" w{index}" for index in range(60)]]
SUITE = """
description: A small one.
text: {{source: {source}, documents: 12, window: 33}}
tasks:
  - metric: perplexity
    arguments: {{context: 32}}
  - metric: invariance
    documents: 2
    arguments: {{draws: 1}}
  - metric: outliers
    arguments: {{context: 32, windows: 4}}
  - metric: quantization_robustness
    arguments: {{schemes: [W8A8, W3A3], frames: [identity, hadamard]}}
  - metric: throughput
    arguments: {{prompt: 8, new_tokens: 4, turns: 3, memory: false}}
"""
# Where the measurements are not the subject.
BRIEF = """
text: {{source: {source}, documents: 12, window: 33}}
tasks:
  - {{metric: perplexity, arguments: {{context: 32}}}}
  - {{metric: throughput, arguments: {{prompt: 16, new_tokens: 1, turns: 3, memory: false}}}}
"""


def options(
    world: Path, output: Path, model: str = "rigpt", against: str | None = None, *, suite: str = "suite", **more: Any
) -> EvaluateOptions:
    """The options of an evaluation: models and suite are names in the folder `world`, or absolute paths."""
    values = {"device": "cpu", "names": ("RiGPT", "GPT-2")} | more
    baseline = str(world / against) if against else None
    return EvaluateOptions(str(world / model), baseline, str(world / f"{suite}.yaml"), output, **values)


def run(*given: Any, **more: Any) -> dict[str, Any]:
    """The results of an evaluation with these `options`."""
    return evaluate(options(*given, **more), Console(quiet=True))


def by_name(results: dict[str, Any], task: str) -> dict[str, Any]:
    """The results of one task."""
    return next(entry for entry in results["tasks"] if entry["task"] == task)


def save(folder: Path, model: PreTrainedModel, words: list[str] = WORDS) -> None:
    """A model with a tokenizer of these words."""
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
