"""
Do free models find the symmetry of their data, as functions and as weights? Along their training: see `--help`.

A model has found a symmetry as a function if relabelling what it reads relabels what it says; it has found it in its
weights if it is itself, up to a gauge transformation, with its tokens relabelled. The control is a relabelling that is
no symmetry of the data.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.table import Table

from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import WRITES
from rigpt_hf.conversion import convert_model
from rigpt_hf.dataclass_options import program
from rigpt_hf.demo.learners import Learner, Parts, make_model, train
from rigpt_hf.symmetry.tokens import TokenSymmetry, learned_symmetry
from rigpt_hf.symmetry.tokens.symmetry import cycles
from rigpt_hf.terminal import Console

from ..common import check_known, check_least
from ..group_words import GROUPS, Words, measure
from ..run_records import RunRecords, shown_progress, spread
from .options import LearnerOptions
from .pictures import draw_curves
from .words import problem


LEARNERS = {"stock GPT-2": Learner("stock-gpt2", "adamw"), "RiGPT": Learner(), "RiGPT, AdamW": Learner(optim="adamw")}
RATES = {"stock GPT-2": 1e-2, "RiGPT": 1e-2, "RiGPT, AdamW": 3e-3}
MEASUREMENTS = 6  # besides the one before the first step; steps double from one to the next


@dataclass(frozen=True)
class Options(LearnerOptions):
    """The learners, their words, and the training."""

    groups: Annotated[list[str], {"help": f"Some of {', '.join(GROUPS)}."}] = field(
        default_factory=lambda: ["SO(2) steps", "S3"]
    )
    length: int = 8
    """Elements of a word."""
    seeds: int = 3
    """Seeds of every learner."""
    steps: int = 1600
    output: Annotated[Path, WRITES] = Path("runs/found.json")
    only: Annotated[str, {"help": f"Some of {'; '.join(LEARNERS)}; separated by semicolons."}] = ";".join(LEARNERS)

    KNOWN = LEARNERS
    DECISIVE = ("length",)

    def __post_init__(self):
        super().__post_init__()
        check_known("groups", self.groups, GROUPS)
        check_least(self, steps=2**MEASUREMENTS, length=2)
        if self.rates:
            raise ValueError(
                f"`rates` must be left out, got {self.rates}: every learner here has one rate of its own."
            )

    @property
    def longer(self) -> int:
        """Elements of the longest word that `measure` asks for."""
        return self.length + 1


def control(table: np.ndarray, symmetry: TokenSymmetry, seed: int) -> TokenSymmetry:
    """A relabelling of the elements that does not respect their products."""
    draw = np.random.default_rng(seed)
    while True:
        row = draw.permutation(len(table))
        if (row[table] != table[row[:, None], row]).any():
            return TokenSymmetry.from_exchanges([cycles(row)], vocab_size=symmetry.vocab_size)


def run_one(options: Options, group: str, name: str, tick: Callable[[int, float], None], seed: int) -> dict[str, Any]:
    """Train a learner on words of a group, and look for the symmetry of products in it along the way."""
    table, symmetry = problem(group)
    other = control(table, symmetry, seed)
    sizes = options.sizes(options.longer + 1)
    model = make_model(LEARNERS[name], len(table) + 1, sizes, seed)
    words = Words(table, options.steps * options.batch, options.length, seed=1000 + seed)
    asked = Words(table, 64, options.length, seed=1).input_ids
    found: list[dict[str, Any]] = []

    def look(step: int) -> None:
        # A copy in float64: relabelling twice the same way must find no difference but that of the models.
        plain = convert_model(model).double() if name == "stock GPT-2" else model
        entry: dict[str, Any] = {"step": step, "right": measure(model.eval(), table, options)["trained_length"]}
        for of, which in (("symmetry", symmetry), ("control", other)):
            learned = learned_symmetry(plain, which, asked)
            entry[of] = {
                "function_mean": learned.function.mean,
                "function_max": learned.function.max,
                "weights": sum(learned.gauge_distances) / len(learned.gauge_distances),
            }
        found.append(entry)
        model.train()

    def batch(step: int) -> Parts:
        rows = slice(step * options.batch, (step + 1) * options.batch)
        return [(words.input_ids[rows], words.labels[rows])]

    due = {options.steps >> n for n in range(MEASUREMENTS)}

    def on_step(step: int, loss: float) -> None:
        tick(step, loss)
        if step in due:
            look(step)

    look(0)
    train(
        LEARNERS[name], model, batch, steps=options.steps, rate=RATES[name], seed=seed, symmetries={}, on_step=on_step
    )
    return {"measured": found}


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Look for the symmetry of products in models that learn them, and print what is there at the end.

    It may be stopped, and goes on where it was. A quick look:

        python -m evaluation.experiments.symmetry.found --groups S3 --seeds 1 --steps 200
    """
    console, seen = console or Console(), check_picture(options.picture, force=True)
    records = RunRecords(options.output, "found", options.settings)
    with shown_progress(options.steps, console) as ticks:
        for group in options.groups:
            for name in options.learners:
                for seed in range(options.seeds):
                    one = partial(run_one, options, group, name, ticks(f"{group}: {name}, seed {seed}"), seed)
                    records.run(one, group=group, learner=name, seed=seed)
    for group in options.groups:
        columns = ("right", "function, nats", "of the control", "weights", "of the control")
        table = Table("learner", *columns, title=f"{group}: mean differences under relabelling, at the end")
        for name in options.learners:
            last = [run["measured"][-1] for run in records.done(group=group, learner=name)]
            cells = [[one["right"] for one in last]]
            for key in ("function_mean", "weights"):
                cells += [[one[of][key] for one in last] for of in ("symmetry", "control")]
            table.add_row(name, *map(spread, cells))
        console.print(table)
    curves = {
        f"{group}, {label}": {
            name: [
                [(one["step"], one["symmetry"][key] / one["control"][key]) for one in run["measured"] if one["step"]]
                for run in records.done(group=group, learner=name)
            ]
            for name in options.learners
        }
        for group in options.groups
        for key, label in (("function_mean", "as a function"), ("weights", "in the weights"))
    }
    title = (
        "How much a model differs after a renaming that keeps the multiplication table, in parts of how much it "
        "differs after one that does not: 0 is a symmetry that was found"
    )
    drawn = partial(draw_curves, curves, "step", "parts of the control's", title=title, logarithmic=True)
    save_picture(options.picture, seen, drawn)
    return records.runs


main = program(Options, run, name="python -m evaluation.experiments.symmetry.found")

if __name__ == "__main__":
    sys.exit(main())
