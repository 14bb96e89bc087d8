"""
The standard tasks, run by EleutherAI's `lm-eval` on the very same models: LAMBADA, HellaSwag, PIQA and all others.

`lm-eval` is optional: `pip install "rigpt-hf[lm-eval]"`. Its tasks load their data from the Hub; tasks of your own are
YAML files in a folder, which may name local data and then need no network.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measures.subjects import Subject


# Names of metrics of `lm-eval` of which less is better.
LESS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


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
    """Of the choice of these examples."""


def check_standard_tasks(names: tuple[str, ...], options: StandardOptions) -> None:
    """
    Raises:
        ValueError: if there are tasks to run and `lm-eval` is not installed, or does not know one of them.
    """
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('`standard_tasks` need lm-eval. Install it with pip install "rigpt-hf[lm-eval]".')
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {options.limit}.")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ValueError(f"`include_path` must be a folder of task files, got {options.include_path!r}.")
    known = _manager(options)
    for name in names:
        if not known.match_tasks([name]):
            raise ValueError(f"`standard_tasks` must be tasks that lm-eval knows, got {name!r}. See lm-eval ls tasks.")


def _manager(options: StandardOptions) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=options.include_path)


def measure_standard_task(name: str, subject: Subject, options: StandardOptions, batch_size: int) -> dict[str, Any]:
    """
    One task of `lm-eval`.

    Returns:
        `dict`: `metrics`: by name, the value and its standard error; `samples`: by name, the value of every example;
        `version` of the task and of `lm-eval`, `fewshot`, `examples`.

    Raises:
        ValueError: if the model has no tokenizer, or the data of the task cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if subject.tokenizer is None:
        raise ValueError(f"`standard_tasks` need a tokenizer, and {subject.name or 'the model'} has none.")
    if subject.tokenizer.pad_token is None:
        subject.tokenizer.pad_token = subject.tokenizer.eos_token or subject.tokenizer.bos_token
    wrapped = HFLM(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        batch_size=batch_size,
        max_length=subject.context(None),
        device=str(subject.device),
    )
    found = lm_eval.simple_evaluate(
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
    if found is None or name not in found["results"]:
        raise ValueError(f"lm-eval gave no result for {name!r}.")
    metrics, samples = {}, {}
    for key, value in found["results"][name].items():
        metric, _, variant = key.partition(",")
        if isinstance(value, int | float) and variant and not metric.endswith("_stderr"):
            metrics[metric] = value
            values = [each.get(metric) for each in found["samples"].get(name, [])]
            # Perplexities of whole texts keep more than a number per example.
            if values and all(isinstance(each, int | float) for each in values):
                samples[metric] = values
    return {
        "metrics": metrics,
        "samples": samples,
        "examples": len(found["samples"].get(name, [])),
        "protocol": {
            "version": found["versions"].get(name),
            "lm_eval": lm_eval.__version__ if hasattr(lm_eval, "__version__") else None,
            "fewshot": found.get("n-shot", {}).get(name),
            "limit": options.limit,
        },
    }
