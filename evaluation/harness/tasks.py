"""How each metric is called, and by which of its numbers models are compared."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rigpt_hf import RiGPTConfig
from rigpt_hf.conversion import convert_model
from rigpt_hf.conversion.families import architecture_of

from ..measures.accuracy import cloze_accuracy, multiple_choice_accuracy
from ..measures.invariance import invariance
from ..measures.likelihood import Tick, no_tick
from ..measures.outliers import outliers
from ..measures.perplexity import beginning, perplexity
from ..measures.quantization import Once, every_time, quantization_robustness
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
        scale (`float`, *optional*): Of the numbers that the value was computed from, whose rounding it has; the value
            itself if not given.
        is_exponential (`bool`): Whether the value is the exponential of that ratio of sums. It has an interval then,
            and no test: that of the ratio is listed beside it.
    """

    name: str
    unit: str
    value: float
    better: Better = "less"
    amounts: list[float] | None = None
    weights: list[float] | None = None
    ratios: list[float] | None = None
    scale: float | None = None
    is_exponential: bool = False


class NotApplicable(Exception):
    """A metric says nothing about a model, which is no failure; the message is the reason."""


def measure(
    task: Task,
    subject: Subject,
    texts: Texts,
    batch_size: int,
    tick: Tick = no_tick,
    once: Once = every_time,
) -> dict[str, Any]:
    """
    One metric of one model.

    `tick` is called with the number of windows that went through it, `once` with the parts of what takes long.

    Returns:
        `dict`: What the metric gives; and where part of it does not apply to this model, `absent`: the reason of each,
        by what is absent.

    Raises:
        NotApplicable: if the metric says nothing about such a model.
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
        if reason := why_unknown(subject):
            raise NotApplicable(reason)
        return invariance(subject, rows, **arguments)
    if task.metric == "outliers":
        return outliers(subject, rows, tick=tick, **arguments)
    absent: dict[str, str] = {}
    others = [frame for frame in arguments.get("frames") or () if frame != "identity"]
    if others and (reason := why_not_convertible(subject)):
        # Of a model that cannot be brought into another frame there is only its own.
        absent = {f"frame {frame}": reason for frame in others}
        arguments["frames"] = [frame for frame in arguments["frames"] if frame == "identity"]
        if not arguments["frames"]:
            raise NotApplicable(reason)
    if not texts.are_tokens:
        arguments.setdefault("bos", can_begin(subject))
    result = quantization_robustness(subject, rows, batch_size=batch_size, tick=tick, once=once, **arguments)
    return result | ({"absent": absent} if absent else {})


def can_begin(subject: Subject) -> bool:
    """Whether there is a token that texts may begin with."""
    try:
        beginning(subject)
    except ValueError:
        return False
    return True


def measure_together(task: Task, subjects: Mapping[str, Subject], tick: Tick = no_tick) -> dict[str, Any]:
    """
    A metric that models take turns in.

    Returns:
        `dict`: What the metric gives of the models that can take part; `absent`: the reason of each other one, if any.

    Raises:
        NotApplicable: if none can.
    """
    absent = {name: reason for name, each in subjects.items() if (reason := why_no_cache(each))}
    able = {name: each for name, each in subjects.items() if name not in absent}
    if not able:
        raise NotApplicable(next(iter(absent.values())))
    return throughput(able, tick=tick, **task.arguments) | ({"absent": absent} if absent else {})


def is_together(task: Task) -> bool:
    """Whether models must be measured side by side, with the machine to themselves."""
    return task.metric == "throughput"


def why_unknown(subject: Subject) -> str:
    """Why nobody knows how a model's stream would turn; nothing if that is known."""
    return "" if isinstance(subject.model.config, RiGPTConfig) else _refusal(architecture_of, subject)


def why_not_convertible(subject: Subject) -> str:
    """Why a model is no RiGPT and cannot be made one; nothing if it is or can."""
    if isinstance(subject.model.config, RiGPTConfig):
        return ""
    # Which looks at more than the family.
    return _refusal(architecture_of, subject) or _refusal(lambda *_: convert_model(subject.model), subject)


def why_no_cache(subject: Subject) -> str:
    """Why a model cannot generate token by token with `past_key_values`; nothing if it can."""
    if "past_key_values" in inspect.signature(subject.model.forward).parameters:
        return ""
    return f"{type(subject.model).__name__} takes no `past_key_values`, with which decoding is timed."


def _refusal(function: Callable[..., Any], subject: Subject) -> str:
    try:
        function(subject.model.config, type(subject.model).__name__)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def quantities(task: Task, result: dict[str, Any]) -> list[Quantity]:
    """The numbers of a result that models are compared by."""
    return QUANTITIES[task.metric](result)


def _perplexity(result: dict[str, Any]) -> list[Quantity]:
    samples = result["samples"]
    tokens = samples["tokens"]
    found = [
        Quantity("perplexity", "per token", result["perplexity"], "less", samples["nats"], tokens, is_exponential=True)
    ]
    bits = [nats / math.log(2) for nats in samples["nats"]]
    if "bytes" in samples:
        found.append(Quantity("bits per byte", "bits", result["bits_per_byte"], "less", bits, samples["bytes"]))
    else:
        # Token ids, or texts joined to one, whose windows have a number of tokens but not of bytes.
        found.append(Quantity("loss", "nats per token", result["loss"], "less", samples["nats"], tokens))
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
        Quantity("excess kurtosis of the stream", "largest of all layers", summary["excess_kurtosis"]),
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
            scale = each["loss"]
            found.append(
                Quantity(name, "nats per token", each["increase"], "less", lost, samples["tokens"], scale=scale)
            )
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
