"""
Does a symmetry of a group's products help to learn them? Words in groups, as of `group_words`: see `--help`.

Whoever renames all elements by `x → h x h⁻¹`, or by another map that respects products, renames the product too. A
model that carries this symmetry need not learn it. It has fewer numbers to choose than a free one of its width; so
there is also one that is wide enough to choose as many.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.table import Table

from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.demo.learners import Learner, Parts, Sizes, make_model, sizes_of, symmetry_of, train
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry
from rigpt_hf.terminal import Console

from ..common import check_known, check_least
from ..group_words import GROUPS, Words, measure, multiplication_table
from ..run_records import RunRecords, shown_progress, spread
from .options import LearnerOptions
from .pictures import draw_curves


WIDE = "RiGPT, symmetry, as many free parameters"
# A part of the spaces rests in irreducible representations: renaming leaves the neutral element alone, and what has no
# part in which nothing moves cannot tell it. Permutations have one, the sums over orbits.
LEARNERS = {
    "stock GPT-2": Learner("stock-gpt2", "adamw"),
    "RiGPT": Learner(),
    "RiGPT, symmetry": Learner(carries="renaming"),
    "RiGPT, permutations": Learner(carries="renaming", kind="permutation", resting=0.0),
    "RiGPT, augmentation": Learner(sees="renaming"),
    WIDE: Learner(carries="renaming"),
}
# The conjugations of a commutative group do nothing.
RENAMINGS = {name: "automorphisms" if name == "SO(2) steps" else "conjugations" for name in GROUPS}
FURTHER = 2  # rates beyond those of the learner
CURVE = 50  # steps between measurements along the training


@dataclass(frozen=True)
class Options(LearnerOptions):
    """The learners, their words, and the training."""

    groups: Annotated[list[str], {"help": f"Some of {', '.join(GROUPS)}.", "show_default": "all"}] = field(
        default_factory=lambda: list(GROUPS)
    )
    length: int = 8
    """Elements of a word that is trained on."""
    longer: int = 16
    """Elements of the longest held-out words."""
    hidden_size: int = 64
    """Stream size of all learners but the wide one."""
    output: Annotated[Path, WRITES] = Path("runs/words.json")
    only: Annotated[str, {"help": f"Some of {'; '.join(LEARNERS)}; separated by semicolons."}] = ";".join(LEARNERS)

    KNOWN = LEARNERS
    DECISIVE = ("length", "longer")

    def __post_init__(self):
        super().__post_init__()
        check_known("groups", self.groups, GROUPS)
        check_least(self, length=1)
        if self.longer <= self.length:
            raise ValueError(
                f"`longer` must be more than `length`, got {self.longer} and {self.length}. Give longer words."
            )


@cache
def problem(group: str) -> tuple[np.ndarray, TokenSymmetry]:
    """The multiplication table of a group, and the maps that respect it as exchanges of tokens."""
    table = multiplication_table(GROUPS[group]())
    renaming = TokenSymmetry.of_table(RENAMINGS[group], table, range(len(table)), vocab_size=len(table) + 1)
    return table, renaming


def width_of_as_many(vocabulary: int, sizes: Sizes, symmetry: TokenSymmetry) -> int:
    """The least stream size, a multiple of twice the heads, at which a symmetric RiGPT has as much to choose."""

    def chosen(width: int, free: bool) -> int:
        with torch.device("meta"):
            model = make_model(
                LEARNERS["RiGPT"], vocabulary, Sizes(width, sizes.layers, sizes.heads, sizes.positions), 0
            )
        carried = None if free else Representation.choose(model.config, symmetry, resting=LEARNERS[WIDE].resting)
        return sizes_of(model, carried)["free_parameters"]

    goal, step = chosen(sizes.hidden_size, True), 2 * sizes.heads
    least, most = sizes.hidden_size // step, sizes.hidden_size // step
    while chosen(most * step, False) < goal:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if chosen(middle * step, False) < goal else (least, middle)
    return most * step


def run_one(
    options: Options, group: str, name: str, tick: Callable[[int, float], None], rate: float, seed: int
) -> dict[str, Any]:
    """Train a learner on words of a group, and ask it for new ones and longer ones."""
    learner, (table, renaming) = LEARNERS[name], problem(group)
    sizes = options.sizes(options.longer + 1)
    if name == WIDE:
        width = width_of_as_many(len(table) + 1, sizes, renaming)
        sizes = Sizes(width, sizes.layers, sizes.heads, sizes.positions)
    model = make_model(learner, len(table) + 1, sizes, seed)
    words = Words(table, options.steps * options.batch, options.length, seed=1000 + seed)
    curve = []

    def batch(step: int) -> Parts:
        rows = slice(step * options.batch, (step + 1) * options.batch)
        return [(words.input_ids[rows], words.labels[rows])]

    def on_step(step: int, loss: float) -> None:
        tick(step, loss)
        if step % CURVE == 0:
            curve.append([step, round(measure(model.eval(), table, options)["trained_length"], 4)])
            model.train()

    training: dict[str, Any] = {
        "steps": options.steps,
        "rate": rate,
        "seed": seed,
        "symmetries": {"renaming": renaming},
    }
    representation = train(learner, model, batch, **training, on_step=on_step)
    found = sizes_of(model, representation) | {"hidden_size": sizes.hidden_size, "curve": curve}
    found |= measure(model, table, options)
    return found | symmetry_of(model, renaming, representation, Words(table, 64, options.length, seed=1).input_ids)


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Train all learners on products in groups, and print the share that they name right.

    It may be stopped, and goes on where it was. A quick look at one group:

        python -m evaluation.experiments.symmetry.words --groups S3 --seeds 1 --steps 200
    """
    console, seen = console or Console(), check_picture(options.picture, force=True)
    records = RunRecords(options.output, "words", options.settings)
    with shown_progress(options.steps, console) as ticks:
        for group in options.groups:
            for name in options.learners:
                one = partial(run_one, options, group, name, ticks(f"{group}: {name}"))
                key = {"group": group, "learner": name}
                records.sweep(one, options.rates_of(name), "loss", options.seeds, further=FURTHER, **key)
    best = {
        group: {name: records.best("loss", group=group, learner=name) for name in options.learners}
        for group in options.groups
    }
    table = Table("learner", *options.groups, title=f"fraction correct in words of {options.length}")
    for name in options.learners:
        table.add_row(name, *(spread([run["trained_length"] for run in one[name]]) for one in best.values()))
    console.print(table)
    curves = {
        group: {name: [list(enumerate(run["accuracy"], 1)) for run in runs] for name, runs in one.items()}
        for group, one in best.items()
    }
    title = f"Products in groups that are named right, by the length of the word (trained up to {options.length})"
    drawn = partial(draw_curves, curves, "length of the word", "fraction correct", title=title)
    save_picture(options.picture, seen, drawn)
    return records.runs


main = program(Options, run, name="python -m evaluation.experiments.symmetry.words")

if __name__ == "__main__":
    sys.exit(main())
