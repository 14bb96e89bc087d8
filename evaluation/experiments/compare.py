"""Compare recipes on one row of tokens: the same data, the same budget, learning rates swept, several seeds.

    python -m evaluation.experiments.compare TRAIN.bin VALIDATION.bin --output runs/compare

TRAIN and VALIDATION are files of little-endian uint16 tokens. Windows of TRAIN are drawn uniformly by NumPy's
`default_rng(0)`, the same for every run, and the validation loss is the mean over 12 batches whose windows
`default_rng(1)` draws. Runs that are done are not done again, so that the command can be stopped and repeated.
"""

import math
import signal
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from rich.table import Table

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.checkpoints.written import file_sha256
from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.pictures import figure, picture
from rigpt_hf.pictures.style import Figure
from rigpt_hf.terminal import Console
from rigpt_hf.training.data import from_tokens
from rigpt_hf.training.diagnostics import kurtosis_in_random_frames
from rigpt_hf.training.loop import PretrainingRun
from rigpt_hf.training.options import PretrainOptions
from rigpt_hf.training.records import Records

from .candidates import CANDIDATES
from .common import band, check_known, check_least, check_rates, least, sweep, write_json
from .run_records import RunRecords


VOCABULARY, CONTEXT, BATCH, VALIDATION_BATCHES = 4096, 256, 16, 12
TOKEN_BYTES = 2
# Windows that go through a model at once: small enough for the caches of a CPU.
MICRO_BATCH = 4
# The file of each run, in its folder.
RESULT = "result.json"
# Decimals of the logs in the summary.
DIGITS = 4


@dataclass(frozen=True)
class Options:
    """The candidates that are compared, and on which tokens."""

    train: Annotated[Path, READS, {"exists": True}]
    """Tokens to train on."""
    validation: Annotated[Path, READS, {"exists": True}]
    """Tokens to validate on."""
    output: Annotated[Path, WRITES] = Path("runs/compare")
    """Folder of all runs."""
    only: Annotated[
        list[str], {"help": f"Some of: {', '.join(CANDIDATES)}; separated by commas.", "show_default": "all"}
    ] = field(default_factory=lambda: list(CANDIDATES))
    rates: Annotated[list[float], {"show_default": "each its own"}] = field(default_factory=list)
    """Learning rates to sweep, separated by commas."""
    seeds: int = 3
    """Seeds at the best rate; the sweep is done with the first."""
    steps: int = 500
    """Steps of every run."""
    precision: Literal["no", "bf16"] = "no"
    """no (float32), or bf16: mixed precision."""
    finished: bool = False
    """Train nothing: report the runs that are done."""
    reference: str | None = None
    """Candidate that final losses are held against."""
    summary: Annotated[Path | None, WRITES] = None
    """File for all results, JSON."""
    figure: Annotated[Path | None, WRITES, {"show_default": "in `output`"}] = None
    """File for the curves: PNG, SVG or PDF."""

    def __post_init__(self):
        check_known("only", self.only, CANDIDATES)
        check_rates(self.rates)
        check_least(self, seeds=1, steps=1)
        if not self.finished:
            check_tokens(self.train, "train", CONTEXT + 2)
            check_tokens(self.validation, "validation", max(BATCH * CONTEXT, CONTEXT + 2))


class DrawnWindows:
    """
    Windows that begin anywhere in a row of tokens, drawn once for all runs.

    Args:
        tokens (`np.ndarray`): The row.
        context, batch_size, steps (`int`): Tokens in a window, windows in a batch, batches in all.
        seed (`int`): Of the draw.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, steps: int, seed: int):
        draw = np.random.default_rng(seed)
        self.starts = [draw.integers(0, len(tokens) - context - 1, batch_size) for _ in range(steps)]
        self.tokens, self.context = tokens, context

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, offset: int = 0
    ) -> dict[str, torch.Tensor]:
        """The share of one process in a step; as [`Windows.batch`], but the seed of the run plays no part."""
        own = np.array_split(self.starts[step], world)[rank]
        # One token more than the context, as every one of them is predicted.
        rows = np.stack([self.tokens[start : start + self.context + 1] for start in own])
        input_ids = torch.from_numpy(rows.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}


def settings_of(options: Options) -> dict[str, Any]:
    """The values that all runs of a comparison have in common, and hashes of their tokens."""
    files = {name: file_sha256(getattr(options, name)) for name in ("train", "validation")}
    return {"steps": options.steps, "precision": options.precision, "context": CONTEXT, "batch": BATCH} | files


def run_one(options: Options, settings: dict[str, Any], name: str, rate: float, seed: int) -> dict[str, Any]:
    """One training run, or what an earlier call wrote of it."""
    folder = options.output / name / f"lr-{rate:g}-seed-{seed}"
    records = RunRecords(folder / RESULT, "compare", settings)
    return records.run(lambda: train(options, settings, folder, name, rate, seed), candidate=name, lr=rate, seed=seed)


def train(
    options: Options, settings: dict[str, Any], folder: Path, name: str, rate: float, seed: int
) -> dict[str, Any]:
    """Train a candidate in a folder, and say what came of it."""
    steps, output, files = options.steps, options.output, (options.train, options.validation)
    data = output / f"data-{settings['train'][:8]}-{settings['validation'][:8]}"
    if not (data / "manifest.json").exists():
        splits = dict(zip(("train", "validation"), files, strict=True))
        from_tokens(splits, data, vocab_size=VOCABULARY, end_of_text=None, progress=False)
    candidate = CANDIDATES[name]
    pretraining = PretrainOptions(
        **asdict(candidate.model),
        **asdict(replace(candidate.optimizer, learning_rate=rate, warmup_steps=min(40, steps // 4))),
        data_dir=str(data),
        data=None,
        context_length=CONTEXT,
        cross_document=True,
        output_dir=str(folder),
        max_steps=steps,
        global_batch_size=BATCH,
        per_device_train_batch_size=math.gcd(MICRO_BATCH, BATCH),
        seed=seed,
        mixed_precision=options.precision,
        eval_steps=25,
        eval_batches=1,
        save_steps=steps,
        save_total_limit=1,
        save_best_limit=0,
        report_to=[],
    )
    run = PretrainingRun(pretraining)
    learned, held_out = (np.memmap(path, dtype="<u2", mode="r") for path in files)
    run.windows = DrawnWindows(learned, CONTEXT, BATCH, steps, seed=0)
    drawn = DrawnWindows(held_out, CONTEXT, BATCH, VALIDATION_BATCHES, seed=1)
    run.validation = [drawn.batch(index, BATCH) for index in range(VALIDATION_BATCHES)]
    if run.train().model_folder is None:  # as it was asked to stop
        signal.raise_signal(run.requests.received)
    with run.average.applied():
        frames = kurtosis_in_random_frames(run.plain, run.validation[0])
    entries = Records(folder / "metrics.jsonl").read()  # of all calls that have gone on with it
    validation = [[entry["step"], entry["validation_loss"]] for entry in entries if "validation_loss" in entry]
    return {
        "steps": steps,
        "tokens_per_step": CONTEXT * BATCH,
        "parameters": sum(parameter.numel() for parameter in run.plain.parameters()),
        "precision": options.precision,
        "validation": validation,
        "final_loss": validation[-1][1],
        "kurtosis": entries[-1]["kurtosis"],
        "kurtosis_in_random_frames": frames,
        "seconds": sum(CONTEXT * BATCH / entry["tokens_per_second"] for entry in entries),
        "logs": {key: [round(entry[key], DIGITS) for entry in entries] for key in ("loss", "gradient_norm")},
    }


def done(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs that there are of a candidate, seed by seed."""
    runs = [run for path in folder.glob(f"*/{RESULT}") for run in RunRecords(path, "compare", settings).runs]
    return sorted(runs, key=lambda run: (run["lr"], run["seed"]))


def at_the_best_rate(runs: list[dict[str, Any]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The final loss of every rate with seed 0, and all runs of the best of them."""
    first = [run for run in runs if run["seed"] == 0]
    best = least(first, "final_loss")["lr"] if first else None
    return losses_by_rate(first), [run for run in runs if run["lr"] == best]


def losses_by_rate(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The final loss of each run, by its rate."""
    return {f"{run['lr']:g}": run["final_loss"] for run in runs}


def tokens_to_reach(result: dict[str, Any], loss: float) -> float:
    """Tokens after which the validation loss was first at most `loss`, linear between measurements; NaN if never."""
    before: tuple[int, float] | None = None
    for step, value in result["validation"]:
        if value <= loss:
            if before is not None:
                share = (before[1] - loss) / (before[1] - value)
                step = before[0] + share * (step - before[0])
            return step * result["tokens_per_step"]
        before = (step, value)
    return math.nan


def run(options: Options) -> None:
    """Sweep the learning rate of every candidate, repeat the best with more seeds, and say what came of it."""
    curves = options.figure or options.output / "losses.png"
    seen, seen_summary = check_picture(curves, True, "figure"), check_file(options.summary, "summary", force=True)
    settings = settings_of(options)
    results: dict[str, list[dict[str, Any]]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    sweeps: dict[str, dict[str, float]] = {}
    for name in options.only:
        if options.finished:
            runs = done(options.output / name, settings)
            sweeps[name], results[name] = at_the_best_rate(runs)
        else:
            rates = options.rates or CANDIDATES[name].rates
            runs, results[name] = sweep(partial(run_one, options, settings, name), rates, options.seeds, "final_loss")
            sweeps[name] = losses_by_rate(runs)
        others[name] = [run for run in runs if run not in results[name]]
    results = {name: runs for name, runs in results.items() if runs}
    if not results:
        given = str(options.output)
        raise ValueError(f"`finished` needs runs that are done in {given!r}, got none. Leave it out.")
    reference = options.reference
    if reference is not None and reference not in results:
        raise ValueError(f"`reference` must be a candidate with runs, got {reference!r}.")
    show(results, reference)
    save_picture(curves, seen, partial(draw, results), argument="figure")
    how = {"torch": torch.__version__, "steps": options.steps, "context": CONTEXT, "batch": BATCH}
    measured = {"sweeps": sweeps, "results": results, "other_rates": others}
    write_json(options.summary, how | measured, None, seen_summary, named=True)


def check_tokens(path: Path, name: str, least: int) -> None:
    """Raise if a file of tokens cannot be one, or has fewer than `least`."""
    size = path.stat().st_size if path.is_file() else 0
    if size % TOKEN_BYTES or size < TOKEN_BYTES * least:
        raise ValueError(
            f"`{name}` must be a file of at least {least} tokens of {TOKEN_BYTES} bytes, got {str(path)!r} of {size} "
            "bytes. Name a longer one."
        )
    largest = int(np.memmap(path, dtype="<u2", mode="r").max())
    if largest >= VOCABULARY:
        raise ValueError(
            f"`{name}` must have tokens below {VOCABULARY}, got {largest} in {str(path)!r}. Name a file of that "
            "vocabulary."
        )


def show(results: dict[str, list[dict[str, Any]]], reference: str | None = None) -> None:
    """A table of means with intervals; tokens are relative to the whole of a stock GPT-2's."""
    baseline = results.get("stock-gpt2")
    goal = statistics.mean(run["final_loss"] for run in baseline) if baseline else math.nan
    columns = ["candidate", "parameters", "rate", "final loss", "tokens to GPT-2's loss", "largest |kurtosis|", "time"]
    table = Table(*columns, *([f"less {reference}"] if reference else []))
    for name, runs in results.items():
        shares = [tokens_to_reach(run, goal) / (run["steps"] * run["tokens_per_step"]) for run in runs]
        table.add_row(
            name,
            f"{runs[0]['parameters'] / 1e6:.2f}M",
            f"{runs[0]['lr']:g}",
            spread([run["final_loss"] for run in runs], "{:.3f}"),
            spread(shares, "{:.1%}"),
            spread([max(map(abs, run["kurtosis"])) for run in runs], "{:.2f}"),
            spread([run["seconds"] for run in runs], "{:.0f} s"),
            *([spread(differences(runs, results[reference]), "{:+.3f}")] if reference else []),
        )
    Console().print(table)


def differences(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Final losses less those of other runs with the same seeds; NaN if there is no seed that both have."""
    final = {run["seed"]: run["final_loss"] for run in others}
    return [run["final_loss"] - final[run["seed"]] for run in runs if run["seed"] in final] or [math.nan]


# What a picture calls candidates.
LABELS = {
    "stock-gpt2": "stock GPT-2",
    "rigpt": "RiGPT",
    "rigpt-adamw": "RiGPT by AdamW",
    "rigpt-layernorm": "RiGPT with LayerNorm",
    "modern-tuned": "modern GPT, tuned",
    "recipe": "RiGPT, the whole recipe",
}


@picture
def draw(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Validation losses by tokens: the mean of a candidate's seeds, and a band from the lowest to the highest."""
    made, (panel,) = figure(title="Loss on text that was held out, by the tokens that were read", width=7, height=4.4)
    # The legend has the order of the curves.
    ends = {name: statistics.mean(run["final_loss"] for run in runs) for name, runs in results.items()}
    for name, runs in sorted(results.items(), key=lambda item: -ends[item[0]]):
        curves = np.array([[loss for _, loss in run["validation"]] for run in runs])
        millions = [step * runs[0]["tokens_per_step"] / 1e6 for step, _ in runs[0]["validation"]]
        band(panel, millions, curves, f"{LABELS.get(name, name)}, {runs[0]['parameters'] / 1e6:.1f}M", alpha=0.2)
    if "stock-gpt2" in results:
        panel.axhline(ends["stock-gpt2"], color="0.6", linestyle=":", label="stock GPT-2 at the end")
    panel.set(xlabel="million tokens", ylabel="validation loss, nats per token")
    panel.legend()
    return made


def spread(values: list[float], form: str) -> str:
    """Mean and 95 % confidence interval (Student's t), as text; the value alone if there is one."""
    if any(math.isnan(value) for value in values):
        return "–"
    if len(values) == 1:
        return form.format(values[0])
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{form.format(statistics.mean(values))} ± {form.format(half)}"


main = program(Options, run, name="python -m evaluation.experiments.compare")

if __name__ == "__main__":
    sys.exit(main())
