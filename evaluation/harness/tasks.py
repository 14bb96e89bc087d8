"""How each metric is called, and by which of its numbers models are compared."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rigpt_hf import RiGPTConfig
from rigpt_hf.conversion import convert_model

from ..measures.accuracy import cloze_accuracy, multiple_choice_accuracy
from ..measures.invariance import invariance
from ..measures.likelihood import Tick, no_tick
from ..measures.outliers import outliers
from ..measures.perplexity import beginning, perplexity
from ..measures.quantization import quantization_robustness
from ..measures.subjects import Subject
from ..measures.throughput import throughput
from .suites import Task
from .texts import Texts, endings, last_words


Better = Literal["less", "more", ""]


@dataclass(frozen=True)
class Quantity:
    """
    A number that models are compared by.

    Args:
        name, unit (`str`): What it is.
        value (`float`): Of this model.
        better (`"less"`, `"more"` or `""`): Which of two is better; nothing where that cannot be said.
        amounts, weights (*optional*): Per example; the value is the sum of the former over the sum of the latter, and
            intervals and tests are made of them. Absent for numbers that no repetition would change.
        ratios (*optional*): To the baseline, of repeated measurements side by side.
    """

    name: str
    unit: str
    value: float
    better: Better = "less"
    amounts: list[float] | None = None
    weights: list[float] | None = None
    ratios: list[float] | None = None


def measure(task: Task, subject: Subject, texts: Texts, batch_size: int, tick: Tick = no_tick) -> dict[str, Any]:
    """
    One metric of one model; `tick` is called with the number of windows that went through it.

    Raises:
        ValueError: if the metric needs what the texts or the model do not have, or an argument is impossible.
    """
    rows = texts.rows[: task.documents]
    arguments = dict(task.arguments)
    if task.metric == "perplexity":
        if not texts.are_tokens:
            # Every token counts then, whatever the tokenizer makes the first one of.
            arguments.setdefault("bos", can_begin(subject))
        return perplexity(subject, rows, batch_size=batch_size, tick=tick, **arguments)
    if task.metric in ("cloze", "multiple_choice"):
        if texts.are_tokens:
            raise ValueError(f"`{task.name}` is made of words, and the suite's text is token ids. Leave it out.")
        if task.metric == "cloze":
            questions: Any = last_words(rows, task.examples)
            return cloze_accuracy(subject, questions, batch_size=batch_size, tick=tick, **arguments)
        questions = endings(rows, task.examples)
        return multiple_choice_accuracy(subject, questions, batch_size=batch_size, tick=tick, **arguments)
    if task.metric == "invariance":
        return invariance(subject, rows, **arguments)
    if task.metric == "outliers":
        return outliers(subject, rows, tick=tick, **arguments)
    if "frames" in arguments and not convertible(subject):
        # Of a model that cannot be brought into another frame there is only its own.
        arguments["frames"] = [frame for frame in arguments["frames"] if frame == "identity"]
    return quantization_robustness(subject, rows, batch_size=batch_size, tick=tick, **arguments)


def can_begin(subject: Subject) -> bool:
    """Whether there is a token that texts may begin with."""
    try:
        beginning(subject)
    except ValueError:
        return False
    return True


def measure_together(task: Task, subjects: Mapping[str, Subject], tick: Tick = no_tick) -> dict[str, Any]:
    """A metric that models take turns in."""
    return throughput(subjects, tick=tick, **task.arguments)


def is_together(task: Task) -> bool:
    """Whether models must be measured side by side, with the machine to themselves."""
    return task.metric == "throughput"


def convertible(subject: Subject) -> bool:
    """Whether a model is a RiGPT or can be made one."""
    if isinstance(subject.model.config, RiGPTConfig):
        return True
    try:
        convert_model(subject.model)  # which looks at more than the family
    except ValueError:
        return False
    return True


def quantities(task: Task, result: dict[str, Any]) -> list[Quantity]:
    """The numbers of a result that models are compared by."""
    return QUANTITIES[task.metric](result)


def _perplexity(result: dict[str, Any]) -> list[Quantity]:
    samples = result["samples"]
    found = [Quantity("perplexity", "per token", result["perplexity"])]
    bits = [nats / math.log(2) for nats in samples["nats"]]
    if "bytes" in samples:
        found.append(Quantity("bits per byte", "bits", result["bits_per_byte"], "less", bits, samples["bytes"]))
    else:
        # Token ids, or texts joined to one, whose windows have a number of tokens but not of bytes.
        found.append(Quantity("loss", "nats per token", result["loss"], "less", samples["nats"], samples["tokens"]))
        if "bits_per_byte" in result:
            found.append(Quantity("bits per byte", "bits", result["bits_per_byte"]))
    if "word_perplexity" in result:
        found.append(Quantity("word perplexity", "per word", result["word_perplexity"]))
    return found


def _accuracy(result: dict[str, Any]) -> list[Quantity]:
    ones = [1.0] * result["examples"]
    found = []
    for key, name in (("accuracy", "accuracy"), ("accuracy_normalized", "accuracy, normalized")):
        if key in result:
            right = [float(each) for each in result["samples"][key]]
            found.append(Quantity(name, "", result[key], "more", right, ones))
    return found


def _invariance(result: dict[str, Any]) -> list[Quantity]:
    return [Quantity(f"largest error, {dtype}", "relative", value) for dtype, value in result["largest"].items()]


def _outliers(result: dict[str, Any]) -> list[Quantity]:
    summary = result["summary"]
    found = [
        Quantity("excess kurtosis of the stream", "largest |value| of all layers", abs(summary["excess_kurtosis"])),
        Quantity("crest factor of the stream", "largest of all layers", summary["crest_factor"]),
    ]
    if summary["outlier_safe_pretraining"] is not None:
        name = "excess kurtosis, Outlier-Safe Pre-Training"
        found.append(Quantity(name, "mean of all blocks", summary["outlier_safe_pretraining"]))
    return found


def _quantization(result: dict[str, Any]) -> list[Quantity]:
    found = []
    for frame, schemes in result["rounded"].items():
        for scheme, each in schemes.items():
            samples = each["samples"]
            lost = [after - before for after, before in zip(samples["nats"], samples["before"], strict=True)]
            name = f"loss of {scheme}, {frame}"
            found.append(Quantity(name, "nats per token", each["increase"], "less", lost, samples["tokens"]))
    return found


def _throughput(result: dict[str, Any]) -> list[Quantity]:
    """Here the result is that of one model, with its ratios to the baseline."""
    units = {
        "prefill_tokens_per_second": ("prefill", "tokens/s", "more"),
        "decode_tokens_per_second": ("decoding", "tokens/s", "more"),
        "time_to_first_token": ("time to first token", "s", "less"),
    }
    found = []
    for key, (name, unit, better) in units.items():
        ratios = result.get("ratios", {}).get(key, {}).get("values")
        found.append(Quantity(name, unit, result[key]["median"], better, ratios=ratios))  # type: ignore[arg-type]
    if "peak_memory" in result:
        found.append(Quantity("peak memory", "bytes", result["peak_memory"]))
    return found


QUANTITIES: dict[str, Callable[[dict[str, Any]], list[Quantity]]] = {
    "perplexity": _perplexity,
    "cloze": _accuracy,
    "multiple_choice": _accuracy,
    "invariance": _invariance,
    "outliers": _outliers,
    "quantization_robustness": _quantization,
    "throughput": _throughput,
}
