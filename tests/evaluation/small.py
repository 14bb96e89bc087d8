"""A small evaluation: a suite of all metrics but the slow ones, of models that `conftest.py` writes."""

from pathlib import Path
from typing import Any

from rigpt_hf.evaluation.harness.runner import EvaluateOptions


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
# Where it is not what is measured that is looked at.
BRIEF = """
text: {{source: {source}, documents: 12, window: 33}}
tasks:
  - {{metric: perplexity, arguments: {{context: 32}}}}
  - {{metric: throughput, arguments: {{prompt: 16, new_tokens: 1, turns: 3, memory: false}}}}
"""


def options(
    world: Path, output: Path, model: str = "rigpt", against: str | None = None, **more: Any
) -> EvaluateOptions:
    """Of the models and the suite in the folder `world`."""
    values = {"suite": str(world / "suite.yaml"), "device": "cpu", "names": ("RiGPT", "GPT-2")} | more
    return EvaluateOptions(str(world / model), str(world / against) if against else None, output=output, **values)


def by_name(results: dict[str, Any], task: str) -> dict[str, Any]:
    """The results of one task."""
    return next(each for each in results["tasks"] if each["task"] == task)
