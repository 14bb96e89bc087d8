"""
Does the present code still give the numbers that are written down? One run of each row of a file: see `--help`.

A row is a learner on a task, at its best rate; of its runs the one with seed 0 is made again. Training amplifies
rounding, so the same run ends with other digits on another machine, or where sums are taken in another order. What can
be asked is whether it ends where runs with other seeds do.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from rich.table import Table

from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.terminal import Console

from .run_records import read_runs


class Experiment(NamedTuple):
    """An experiment: what tells its rows apart, and the number of a run that is compared."""

    options: dict[str, str]
    """For each key that tells its rows apart, the option that chooses by it."""
    measured: str
    """What `value` gives, in words."""
    value: Callable[[dict[str, Any]], float]
    """Of one run."""


EXPERIMENTS = {
    "scan": Experiment({"split": "splits"}, "answered right", lambda run: run["test_accuracy"]),
    "words": Experiment({"group": "groups"}, "answered right", lambda run: run["trained_length"]),
    "modular": Experiment({"task": "tasks", "share": "shares"}, "answered right", lambda run: run["test_accuracy"]),
    "chorales": Experiment({}, "nats per note", lambda run: run["test_loss"]),
    "found": Experiment({"group": "groups"}, "answered right", lambda run: run["measured"][-1]["right"]),
}
SHOWN = 4  # digits after the point


@dataclass(frozen=True)
class Options:
    """The runs, and which of them."""

    results: Annotated[Path, READS, {"exists": True}]
    """File of runs that an experiment wrote."""
    output: Annotated[Path, WRITES] = Path("runs/again.json")
    """File of the runs that are made again; those that it has are not."""
    only: str = ""
    """Rows whose names begin so; all if not given."""


def rows_of(runs: list[dict[str, Any]], keys: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each row, by its name: those at the rate that most seeds have, seed by seed."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        rows.setdefault(", ".join(str(run[key]) for key in keys), []).append(run)
    for name, row in rows.items():
        ((rate, _),) = Counter(run.get("rate") for run in row).most_common(1)
        rows[name] = [run for run in row if run.get("rate") == rate]
    return rows


def made_again(options: Options, facts: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The run that the program of the experiment makes with what is known of another."""
    module = importlib.import_module(f".symmetry.{facts['experiment']}", __package__)
    keys = EXPERIMENTS[facts["experiment"]].options
    chosen = {option: [run[key]] for key, option in keys.items()}
    rates = {"rates": [run["rate"]]} if "rate" in run else {}
    given = module.Options(**facts["settings"], **chosen, **rates, only=run["learner"], seeds=1, output=options.output)
    known = {key: run[key] for key in (*keys, "learner", "seed", "rate") if key in run}
    (made,) = (made for made in module.run(given, Console(quiet=True)) if known.items() <= made.items())
    return made


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Make one run of each row of a file of runs again, and print it beside the runs that the file has.

    It may be stopped, and goes on where it was. One row:

        python -m evaluation.experiments.again evaluation/results/words.json --only "S3, RiGPT, symmetry"
    """
    console = console or Console()
    facts, runs = read_runs(options.results, "results")
    if facts["experiment"] not in EXPERIMENTS:
        raise ValueError(
            f"`results` must be runs of {', '.join(EXPERIMENTS)}, got {str(options.results)!r} of "
            f"{facts['experiment']}. Run its own command again."
        )
    experiment = EXPERIMENTS[facts["experiment"]]
    rows = rows_of(runs, [*experiment.options, "learner"])
    chosen = {name: row for name, row in rows.items() if name.startswith(options.only)}
    if not chosen:
        raise ValueError(f"`only` must begin the name of a row, got {options.only!r}. Rows: {'; '.join(rows)}.")
    table = Table("", "then", "all seeds", "now", "among them", title=f"{facts['experiment']}: {experiment.measured}")
    made = []
    for name, row in chosen.items():
        console.print(f"{name}, seed {row[0]['seed']}")
        made.append(made_again(options, facts, row[0]))
        then, now = [round(experiment.value(run), SHOWN) for run in row], round(experiment.value(made[-1]), SHOWN)
        among = "yes" if min(then) <= now <= max(then) else f"{now - min(then, key=lambda one: abs(one - now)):+.4f}"
        table.add_row(
            name, f"{then[0]:.4f}", f"{min(then):.4f}–{max(then):.4f}" if row[1:] else "–", f"{now:.4f}", among
        )
    console.print(table)
    return made


main = program(Options, run, name="python -m evaluation.experiments.again")

if __name__ == "__main__":
    sys.exit(main())
