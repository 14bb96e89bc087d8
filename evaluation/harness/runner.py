"""The whole of an evaluation: models are loaded, measured task by task, compared, and the output is written."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from rich.progress import Progress, TimeElapsedColumn
from rich.text import Text

from rigpt_hf.checkpoints.disk import DiskFullError, check_writable
from rigpt_hf.checkpoints.folder import Seen
from rigpt_hf.checkpoints.leftovers import remove_leftovers
from rigpt_hf.checkpoints.source import names_of
from rigpt_hf.checkpoints.written import parse_json
from rigpt_hf.terminal import Console
from rigpt_hf.text.paths import without_path

from ..measure import NotApplicable
from ..measures import MEASURES
from ..models import EvaluatedModel, evaluated
from . import results as writing
from .cache import Cache, Parts, fingerprint
from .standard_tasks import StandardOptions, check_standard_tasks, fingerprint_of_tasks, measure_standard_task
from .suites import Suite, Task, arguments_of, load_suite
from .tasks import measure, measure_together
from .texts import Texts, load_texts


# Names that tables, figures, terminals and pages all show unchanged.
NAME = re.compile(r"[A-Za-z0-9][\w .,+/()-]*", re.ASCII)
# Some metrics take one window at a time, and speed is that of a prompt.
SMALLER = "Give a smaller `batch_size`, or a smaller `context` or `prompt` in the suite, and run again."


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of `rigpt evaluate`."""

    model: str
    """Folder or Hub id of the model."""
    against: str | None = None
    """Folder or Hub id of the baseline."""
    suite: str = "core"
    """A packaged suite, or a YAML file."""
    output: Path | None = None
    """Folder for results, report and cache; one of `runs/evaluation` with the names of the models if not given."""
    text: str | None = None
    """Where the text comes from, instead of what the suite says."""
    documents: int | None = None
    """How many documents, instead of what the suite says."""
    fraction: float = 1.0
    """Share of the suite's documents and examples that is measured, where `documents` does not say how many."""
    standard_tasks: tuple[str, ...] = ()
    """Tasks of `lm-eval`."""
    standard: StandardOptions = field(default_factory=StandardOptions)
    """How they are run."""
    batch_size: int = 8
    """Rows that go through a model at once."""
    device: str | None = None
    """Where to compute; the first GPU if there is one."""
    dtype: str | None = None
    """Precision of the weights; as they are stored if not given."""
    names: tuple[str, str] = ("model", "baseline")
    """Names of the two in tables and figures."""
    force: bool = False
    """Whether results of other models in the folder may be replaced."""

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        sources = [source for source in (self.model, self.against) if source is not None]
        return self.output or Path("runs/evaluation", "-against-".join(names_of(sources, "-")))


@dataclass
class EvaluationJob:
    """One measurement: of one model, or of all together."""

    task: str
    models: tuple[str, ...]
    key: str
    run: Any
    alone: bool = False
    parts: Parts | None = None


def evaluate(options: EvaluateOptions, console: Console | None = None) -> dict[str, Any]:
    """
    Measure a model, and a baseline beside it, and write `results.json`, `table.md` and `report.html`.

    A measurement that fails is one line in the results; the others are kept. What was measured before, of the same
    weights on the same text with the same arguments, is not measured again. Under `accelerate launch` the measurements
    are shared among the processes, but for those of speed, which one process takes when all others are done.

    Raises:
        ValueError: if an option is impossible, before anything is measured.
    """
    console = console or Console()
    # Processes wait for each other's measurements, which may take hours.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))
    suite, output = _suite(options), options.folder
    seen = check_output(output)
    check_names(options, suite)
    check_standard_tasks(options.standard_tasks, options.standard)
    # A number of documents that was asked for is meant.
    texts = load_texts(suite.text, suite.fraction if options.documents is None else 1.0)
    models = _models(options, state)
    check_one_vocabulary(texts, models)
    check_tokenizers(suite, texts, models)
    suite = fitted(suite, models)
    hashes = {name: fingerprint(model) for name, model in models.items()}
    if not options.force:
        check_same_models(output, hashes)
    cache = Cache(output / "cache")
    jobs = list(_jobs(options, suite, texts, models, hashes, cache))
    own = [
        job
        for index, job in enumerate(c for c in jobs if not c.alone)
        if index % state.num_processes == state.process_index
    ]
    errors = _run(own, cache, console if state.is_main_process else Console(quiet=True), batch=options.batch_size)
    state.wait_for_everyone()
    if state.is_main_process:
        errors |= _run([job for job in jobs if job.alone], cache, console, batch=options.batch_size)
    state.wait_for_everyone()
    gathered = {key: line for part in gather_object([errors]) for key, line in part.items()}
    found = {job.key: cache.get(job.key) for job in jobs}
    results = writing.build(options, suite, texts, models, hashes, jobs, found, gathered)
    if state.is_main_process:
        writing.write(results, output, seen)
    state.wait_for_everyone()
    return results


def _suite(options: EvaluateOptions) -> Suite:
    suite = load_suite(options.suite).part(options.fraction)
    given = {"source": options.text, "documents": options.documents}
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(suite, text=replace(suite.text, **said))


def check_output(output: Path) -> Seen:
    """
    A `ValueError` if the folder holds something that no evaluation left, or that was changed since; gives the stamps
    of what an earlier one left.
    """
    check_writable(output / writing.RESULTS, "output")
    if not output.exists():
        return {}
    if not output.is_dir():
        raise ValueError(f"`output` must be a folder, got the file {str(output)!r}. Name another.")
    for name in writing.MADE_HERE:
        remove_leftovers(output / name)
    # Nobody owns the file that a killed run of another machine was writing.
    there = {path.name for path in output.iterdir() if not path.name.endswith(".partial")}
    if strange := sorted(there - writing.MADE_HERE):
        raise ValueError(
            f"`output` must be absent, empty or an earlier evaluation, got {str(output)!r} with {strange[0]!r}. Name "
            "another folder."
        )
    return writing.check_files(output)


def check_same_models(output: Path, hashes: dict[str, str]) -> None:
    """A `ValueError` if results in the folder have another model or baseline than is measured now."""
    path = output / writing.RESULTS
    if not path.is_file():
        return
    try:
        recorded = [(name, each["sha256"]) for name, each in parse_json(path.read_text("utf-8"))["models"].items()]
        # The order says which is the baseline: the other way round every difference is another.
        own = [*hashes.values(), *[None] * len(recorded)]
        lost = [
            f"other weights as {name}" for (name, digest), now in zip(recorded, own, strict=False) if digest != now
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        lost = [f"a {writing.RESULTS} that cannot be read"]
    if lost:
        raise ValueError(
            f"`output` must hold results of the same weights in the same roles or none, got {str(output)!r} with "
            f"{lost[0]}. Name another folder, or pass `force=True` to replace them; what was measured stays in its "
            "cache."
        )


def _models(options: EvaluateOptions, state: PartialState) -> dict[str, EvaluatedModel]:
    device = options.device or str(state.device)
    sources = dict(zip(options.names, (options.model, options.against), strict=True))
    # Messages go into results that are published; where a model lies on this machine is nobody's business.
    return {
        name: replace(evaluated(source, device=device, dtype=options.dtype), name=name)
        for name, source in sources.items()
        if source is not None
    }


def check_names(options: EvaluateOptions, suite: Suite) -> None:
    """A `ValueError` if names of models or tasks are taken twice, or cannot stand in tables, figures and messages."""
    if options.names[0] == options.names[1]:
        raise ValueError(f"`names` must differ, got {options.names[0]!r} twice.")
    for argument, names in (("names", options.names), ("tasks", tuple(task.name for task in suite.tasks))):
        if strange := [name for name in names if not NAME.fullmatch(name)]:
            raise ValueError(
                f"`{argument}` must be letters, digits, spaces and . , + - / ( ), the first a letter or digit, got "
                f"{strange[0]!r}."
            )
    if twice := {task.name for task in suite.tasks} & set(options.standard_tasks):
        raise ValueError(f"`standard_tasks` must not be named as a task of the suite, got {sorted(twice)[0]!r}.")


def check_one_vocabulary(texts: Texts, models: dict[str, EvaluatedModel]) -> None:
    """A `ValueError` if the text is token ids and models are known to mean different tokens by them."""
    tokenizers = [each.tokenizer for each in models.values() if each.tokenizer is not None]
    if texts.are_tokens and len({json.dumps(each.get_vocab(), sort_keys=True) for each in tokenizers}) > 1:
        raise ValueError(
            f"`text` must be words where tokenizers differ, got the token ids of {texts.source['source']!r}. Give "
            "a text, JSONL or parquet file."
        )


def check_tokenizers(suite: Suite, texts: Texts, models: dict[str, EvaluatedModel]) -> None:
    """A `ValueError` if a model cannot read the text, which every measure but those of speed would say once more."""
    if texts.are_tokens or all(MEASURES[task.metric].together for task in suite.tasks):
        return
    for argument, each in zip(("model", "against"), models.values(), strict=False):
        if each.tokenizer is None:
            raise ValueError(
                f"`{argument}` must come with its tokenizer, got {each.source!r}, which has none that loads here. Put "
                "the tokenizer's files there, or name a .bin of token ids with `text`."
            )


def fitted(suite: Suite, models: dict[str, EvaluatedModel]) -> Suite:
    """
    The suite with windows and prompts that fit into every model, and are the same for all where a suite leaves them to
    the model; results say which they were.
    """

    def of_task(task: Task) -> Task:
        known = arguments_of(task.metric)
        record = MEASURES[task.metric]
        if "context" not in known and not record.together:
            return task
        default = known["context"][1] if "context" in known else None
        return replace(task, arguments=record.fit(dict(task.arguments), default, list(models.values())))

    return replace(suite, tasks=tuple(map(of_task, suite.tasks)))


def _jobs(
    options: EvaluateOptions,
    suite: Suite,
    texts: Texts,
    models: dict[str, EvaluatedModel],
    hashes: dict[str, str],
    cache: Cache,
) -> Iterator[EvaluationJob]:
    device = next(iter(models.values())).device
    machine = writing.hardware(device)
    # Arithmetic is another one on another device.
    where = {name: value for name, value in machine.items() if name in ("device", "gpu")}
    # All processes must look in the same place, whatever GPU each has.
    where, machine = broadcast_object_list([where, machine])
    # Kept without the names, which may be others the next time.
    numbered = {str(index): model for index, model in enumerate(models.values())}
    for task in suite.tasks:
        if MEASURES[task.metric].together:
            # Speed depends on the machine, and on nothing that the models read.
            key = cache.key(task=asdict(task), models=list(hashes.values()), machine=machine)
            run: Any = partial(_run_together, task, numbered)
            yield EvaluationJob(task.name, tuple(models), key, run, alone=True)
            continue
        for name, model in models.items():
            what = asdict(task) | {"text": texts.source["sha256"]}
            key = cache.key(task=what, model=hashes[name], where=where)
            parts = Parts(cache, key)
            run = partial(_run_task, task, model, texts, memoize=parts)
            yield EvaluationJob(task.name, (name,), key, run, parts=parts)
    own_tasks = fingerprint_of_tasks(options.standard) if options.standard_tasks else ""
    # The same for both, or the one that takes less would be asked something else.
    own = [model.positions for model in models.values()] + [options.standard.max_length]
    context = min((length for length in own if length is not None), default=None)
    for standard in options.standard_tasks:
        for name, model in models.items():
            what = {"standard": standard, "options": asdict(options.standard), "files": own_tasks, "context": context}
            key = cache.key(**what, model=hashes[name], where=where)
            run = partial(_run_standard_task, standard, model, options.standard, context)
            yield EvaluationJob(standard, (name,), key, run)


def _run_task(
    task: Task, model: EvaluatedModel, texts: Texts, *, memoize: Parts, batch: int, progress: Any
) -> dict[str, Any]:
    return measure(task, model, texts, batch, progress, memoize)


def _run_together(task: Task, models: dict[str, EvaluatedModel], *, batch: int, progress: Any) -> dict[str, Any]:
    return measure_together(task, models, progress)


def _run_standard_task(
    name: str, model: EvaluatedModel, options: StandardOptions, context: int | None, *, batch: int, progress: Any
) -> dict[str, Any]:
    return measure_standard_task(name, model, options, batch, context)


def _run(jobs: list[EvaluationJob], cache: Cache, console: Console, batch: int) -> dict[str, str]:
    """Measure what is not in the cache yet; returns a line for each failure, by its key."""
    errors = {}
    columns = [*Progress.get_default_columns(), TimeElapsedColumn()]
    shown = Console(stderr=True, quiet=console.quiet)
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as progress:
        bar = progress.add_task("measuring", total=len(jobs))
        # How many windows a measurement needs only it knows; that they move says that it is alive.
        windows = progress.add_task("windows", total=None)

        def advance(done: int) -> None:
            progress.advance(windows, done)
            progress.update(windows, description=f"windows or turns: {progress.tasks[windows].completed:.0f}")

        for job in jobs:
            progress.update(bar, description=f"{job.task}: {' and '.join(job.models)}")
            if cache.get(job.key) is None:
                try:
                    cache.put(job.key, job.run(batch=batch, progress=advance))
                    if job.parts is not None:
                        job.parts.drop()
                except NotApplicable as reason:
                    cache.put(job.key, {"not applicable": without_path(str(reason))})
                except (torch.OutOfMemoryError, MemoryError):
                    errors[job.key] = f"out of memory with `batch_size` {batch}. {SMALLER}"
                except DiskFullError:  # nothing more can be kept
                    raise
                except Exception as error:  # one measurement must not cost the others
                    errors[job.key] = one_line(error)
                if job.key in errors:
                    line = f"{job.task}, {' and '.join(job.models)}: {errors[job.key]}"
                    shown.print(Text(line, style="red"))
            progress.advance(bar)
    return errors


def one_line(error: Exception) -> str:
    """An error in one line; memory that ran out in words that say what to do."""
    line = without_path(" ".join(str(error).split()))[:300]
    if "out of memory" in line or "can't allocate memory" in line:
        return f"out of memory. {SMALLER}"
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"
