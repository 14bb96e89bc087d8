"""
The standard tasks, run by EleutherAI's `lm-eval` on the very same models: LAMBADA, HellaSwag, PIQA and all others.

`lm-eval` is optional: `pip install "rigpt-hf[lm-eval]"`. Its tasks load their data from the Hub; tasks of your own are
YAML files in a folder, which name local data and no code, and need no network.
"""

import hashlib
import importlib.util
import math
import re
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..likelihood import exponential
from ..measure import Measure, Quantity
from ..models import EvaluatedModel
from .own_tasks import check_task_files


# Names of metrics of `lm-eval` of which less is better.
LESS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
# Shares of right answers.
SHARES = ("accuracy", "acc", "acc_norm", "acc_bytes", "acc_all", "exact_match")


@dataclass(frozen=True)
class StandardOptions:
    """How standard tasks are run."""

    include_path: str | None = None
    """Folder of task files of one's own."""
    limit: int | None = None
    """Examples of each task at most; all if not given."""
    fewshot: int | None = None
    """Examples before each question; as the task says if not given."""
    seed: int = 0
    """Seed that chooses these examples."""
    max_length: int | None = None
    """Tokens of a request that are read at most, the last ones; as many as both models take if not given."""


def check_standard_tasks(names: tuple[str, ...], options: StandardOptions) -> None:
    """
    Raises:
        ValueError: if there are tasks to run and `lm-eval` is not installed, or does not know one of them; or if there
            are none and something is said about them.
    """
    if not names:
        given = {name: getattr(options, name) for name in ("include_path", "limit", "fewshot", "max_length")}
        if alone := [(name, value) for name, value in given.items() if value is not None]:
            raise ValueError(
                f"`{alone[0][0]}` is for `standard_tasks`, got {alone[0][1]!r} and no such task. Name some, or leave "
                "it out."
            )
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('`standard_tasks` need lm-eval. Install it with pip install "rigpt-hf[lm-eval]".')
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {options.limit}.")
    if options.max_length is not None and options.max_length < 2:
        raise ValueError(f"`max_length` must be at least 2, got {options.max_length}.")
    if options.fewshot is not None and options.fewshot < 0:
        raise ValueError(f"`fewshot` must not be negative, got {options.fewshot}.")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ValueError(f"`include_path` must be a folder of task files, got {options.include_path!r}.")
    if options.include_path is not None:
        check_task_files(Path(options.include_path))
    known = _manager(options)
    for name in names:
        # A pattern would stand for several tasks, and a result for one.
        if known.match_tasks([name]) != [name]:
            raise ValueError(f"`standard_tasks` must be tasks that lm-eval knows, got {name!r}. See lm-eval ls tasks.")


def _manager(options: StandardOptions) -> Any:
    return _manager_of(options.include_path, fingerprint_of_tasks(options))


@cache
def _manager_of(include_path: str | None, fingerprint: str) -> Any:
    # It reads some ten thousand files, which takes seconds; those of one's own may change between two calls.
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def fingerprint_of_tasks(options: StandardOptions) -> str:
    """SHA-256 of the task files of one's own and of the data beside them, and the version of the library."""
    import lm_eval

    digest = hashlib.sha256(str(lm_eval.__version__).encode())
    if options.include_path is not None:
        for path in sorted(Path(options.include_path).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(options.include_path)).encode() + path.read_bytes())
    return digest.hexdigest()


def _parts(name: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks that a group stands for, of groups in it too."""
    members = groups.get(name, [])
    return [part for member in members for part in _parts(member, groups)] if members else [name]


def measure_standard_task(
    name: str, model: EvaluatedModel, options: StandardOptions, batch_size: int, context: int | None = None
) -> dict[str, Any]:
    """
    One task of `lm-eval`.

    Args:
        name: Of the task or group.
        model: The model, which needs a tokenizer.
        options: How the task is run.
        batch_size: Requests that go through the model at once.
        context: Tokens of a request that are read at most, the last ones; as many as the model takes if not given.

    Returns:
        `dict`: `metrics`: by name, the value and its standard error; `samples`: by name, the value of every example;
        `examples`; `protocol`: `version` of the task, `lm_eval` (its version), `fewshot` (as it was run, a list where
        the tasks of a group differ), `seed`, `limit`, `context`, and how many requests were `cut` to it; and `absent`,
        where a task takes no other number of solved examples than its own.

    Raises:
        ValueError: if the model has no tokenizer, or the data of the task cannot be had.
    """
    import lm_eval

    if model.tokenizer is None:
        raise ValueError(f"`standard_tasks` need a tokenizer, and {model.name or 'the model'} has none.")
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token or model.tokenizer.bos_token
    wrapped = _wrapped(model, batch_size, context or model.positions)
    result = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=[name],
        num_fewshot=options.fewshot,
        limit=options.limit,
        task_manager=_manager(options),
        bootstrap_iters=0,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    if result is None or name not in result["results"]:
        raise ValueError(f"lm-eval gave no result for {name!r}.")
    examples = result["samples"]
    parts = (
        [name] if name in examples else [part for part in _parts(name, result["group_subtasks"]) if part in examples]
    )
    # A task that sets 0 itself takes no other number, and says so in a log only; running text has no question.
    shots = sorted({_shots(part, result) for part in parts})
    metrics, samples = {}, {}
    for key, value in result["results"][name].items():
        metric, _, variant = key.partition(",")
        if not isinstance(value, int | float) or not variant or metric.endswith("_stderr"):
            continue
        # Answers that are read in several ways are listed once for each.
        rows = [row for part in parts for row in examples[part] if row.get("filter", variant) == variant]
        label = metric if variant == "none" else f"{metric} ({variant})"
        metrics[label] = value
        values = [row.get(metric) for row in rows]
        if not values or not all(isinstance(amount, int | float) for amount in values):
            continue
        if math.isclose(statistics.fmean(values), value, rel_tol=1e-6, abs_tol=1e-9):
            samples[label] = list(map(float, values))
        elif math.isclose(exponential(-statistics.fmean(values)), value, rel_tol=1e-6):
            # The library keeps the log-likelihood of each example of a perplexity.
            metrics[f"log {label}"] = -statistics.fmean(values)
            samples[f"log {label}"] = [-float(amount) for amount in values]
    return {
        "metrics": metrics,
        "samples": samples,
        "examples": max(map(len, samples.values()), default=sum(len(examples[part]) for part in parts)),
        "protocol": {
            "version": result["versions"].get(name),
            "lm_eval": lm_eval.__version__,
            "fewshot": shots[0] if len(shots) == 1 else shots,
            "seed": options.seed,
            "limit": options.limit,
            "context": wrapped.max_length,
            "cut": wrapped.cut,
        },
    } | _refused_shots(name, options.fewshot, shots)


def _shots(name: str, found: dict[str, Any]) -> int:
    """Solved examples that stood before each question of a task."""
    if found["configs"][name].get("output_type") == "loglikelihood_rolling":
        return 0
    return found.get("n-shot", {}).get(name, 0)


def _refused_shots(name: str, asked: int | None, given: list[int]) -> dict[str, Any]:
    if asked is None or given == [asked]:
        return {}
    shown = " and ".join(map(str, given))
    return {"absent": {f"with {asked} solved examples": f"{name} has {shown} by itself, which is what was measured."}}


def _wrapped(model: EvaluatedModel, batch_size: int, context: int | None) -> Any:
    """The model as `lm-eval` asks it; counts in `cut` the requests that are longer than it reads."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        cut = 0

        def _loglikelihood_tokens(self, requests: Any, *given: Any, **more: Any) -> Any:
            # The last token is asked for and not read.
            self.cut += sum(len(before) + len(asked) - 1 > self.max_length for _, before, asked in requests)
            return super()._loglikelihood_tokens(requests, *given, **more)

        def tok_batch_encode(
            self, strings: Any, *given: Any, left_truncate_len: int | None = None, **more: Any
        ) -> Any:
            # Prompts of answers that are written, with room for these.
            if left_truncate_len is not None:
                self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
            return super().tok_batch_encode(strings, *given, left_truncate_len=left_truncate_len, **more)

    return Wrapped(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
        max_length=context,
        device=str(model.device),
    )


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """All metrics of a task, those with the values of every example to be tested."""
    listed = []
    for name, value in result["metrics"].items():
        amounts = result["samples"].get(name)
        ones = None if amounts is None else [1.0] * len(amounts)
        is_less = name.removeprefix("log ").partition(" (")[0] in LESS
        listed.append(Quantity(name, "", value, "less" if is_less else "more", amounts, ones))
    return listed


MEASURE = Measure(
    "lm-eval",
    "A task of EleutherAI's lm-eval.",
    measure_standard_task,
    quantities,
    hub_types={"acc": "accuracy", "acc_norm": "accuracy_normalized"},
    difference_in=lambda quantity: "points" if re.split(r"[ ,(]", quantity["name"])[0] in SHARES else "percent",
)
