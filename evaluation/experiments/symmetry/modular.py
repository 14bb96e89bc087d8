"""
How many examples does it take to learn sums and products modulo a prime? With and without symmetry: see `--help`.

Whoever multiplies all numbers by a unit, `a → u a`, multiplies sums too; whoever takes all to a power, `a → aᵏ` with
`k` coprime to `p - 1`, takes products to it. A share of all pairs is trained on; of the others one half chooses the
rates, and the other is the test. Rates are swept at the first share, the largest, with the first seed: where pairs are
too few to learn from, the best of them is chosen by chance.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.table import Table
from sympy import isprime
from sympy.ntheory import primitive_root

from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.demo.learners import Learner, Parts, answers, make_model, sizes_of, symmetry_of, train
from rigpt_hf.symmetry.tokens import TokenSymmetry
from rigpt_hf.symmetry.tokens.symmetry import cycles, generating
from rigpt_hf.terminal import Console

from ..common import check_known
from ..run_records import RunRecords, shown_progress, spread
from .options import LearnerOptions
from .pictures import Curve, draw_curves


LEARNERS = {
    "stock GPT-2": Learner("stock-gpt2", "adamw"),
    "RiGPT": Learner(),
    "RiGPT, symmetry": Learner(carries="renaming"),
    "RiGPT, augmentation": Learner(sees="renaming"),
}
TASKS = ("sums", "products")
LARGEST = 127  # all pairs of numbers are in memory, with their answers
FURTHER = 2  # rates beyond those of the learner
ERROR = "validation_error"  # by which rates are chosen; a loss punishes the certainty of one that is right on most


@dataclass(frozen=True)
class Options(LearnerOptions):
    """The learners, their examples, and the training."""

    tasks: Annotated[list[str], {"help": f"Some of {', '.join(TASKS)}.", "show_default": "both"}] = field(
        default_factory=lambda: list(TASKS)
    )
    shares: list[float] = field(default_factory=lambda: [0.4, 0.05, 0.1, 0.2])
    """Shares of all pairs that are trained on; rates are swept with the first."""
    prime: int = 31
    """The modulus."""
    steps: int = 1000
    layers: int = 2
    output: Annotated[Path, WRITES] = Path("runs/modular.json")
    only: Annotated[str, {"help": f"Some of {'; '.join(LEARNERS)}; separated by semicolons."}] = ";".join(LEARNERS)

    KNOWN = LEARNERS
    DECISIVE = ("prime",)

    def __post_init__(self):
        super().__post_init__()
        check_known("tasks", self.tasks, TASKS)
        if not (5 <= self.prime <= LARGEST and isprime(self.prime)):
            raise ValueError(f"`prime` must be a prime number from 5 to {LARGEST}, got {self.prime}. Take 31.")
        if not self.shares:
            raise ValueError("`shares` must have one to sweep the rates with, got none. Take 0.4.")
        for share in self.shares:
            if not 1 <= share * self.prime**2 <= self.prime**2 - 2:
                raise ValueError(
                    f"`shares` must leave pairs to train on and two to test, got {share} of {self.prime**2}. Take 0.2."
                )


@cache
def renaming(task: str, prime: int) -> TokenSymmetry:
    """The maps that respect sums or products, as exchanges of tokens."""
    numbers = np.arange(prime)
    if task == "sums":
        maps = [numbers * primitive_root(prime) % prime]
    else:
        powers = [k for k in range(2, prime - 1) if math.gcd(k, prime - 1) == 1]
        maps = generating([np.array([pow(int(a), k, prime) for a in numbers]) for k in powers])
    return TokenSymmetry.from_exchanges([cycles(one) for one in maps], vocab_size=prime + 1)


def examples(task: str, prime: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs with their results: token ids `a b = c`, `[prime², 4]`, and labels that ask for the result alone."""
    a, b = torch.cartesian_prod(torch.arange(prime), torch.arange(prime)).T
    result = (a + b if task == "sums" else a * b) % prime
    ids = torch.stack([a, b, torch.full_like(a, prime), result], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = result
    return ids, labels


def split(count: int, share: float, seed: int) -> list[torch.Tensor]:
    """Numbers of the examples to train on, to choose by and to test on."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    trained = round(share * count)
    half = (count - trained) // 2
    return list(order.split([trained, half, count - trained - half]))


def run_one(
    options: Options, task: str, share: float, name: str, tick: Callable[[int, float], None], rate: float, seed: int
) -> dict[str, Any]:
    """Train a learner on a share of the pairs, and ask it for the others."""
    learner, symmetry = LEARNERS[name], renaming(task, options.prime)
    ids, labels = examples(task, options.prime)
    trained, chosen, tested = split(len(ids), share, seed)
    model = make_model(learner, options.prime + 1, options.sizes(4), seed)
    draw = np.random.default_rng(1000 + seed)

    def batch(step: int) -> Parts:
        rows = trained[torch.from_numpy(draw.integers(len(trained), size=options.batch))]
        return [(ids[rows], labels[rows])]

    training: dict[str, Any] = {"steps": options.steps, "rate": rate, "seed": seed, "on_step": tick}
    representation = train(learner, model, batch, symmetries={"renaming": symmetry}, **training)
    loss, right = answers(model, [(ids[chosen], labels[chosen])])
    return {
        **sizes_of(model, representation),
        "examples": len(trained),
        "validation_loss": loss,
        ERROR: 1 - float(right.mean()),
        "train_accuracy": float(answers(model, [(ids[trained], labels[trained])])[1].mean()),
        "test_accuracy": float(answers(model, [(ids[tested], labels[tested])])[1].mean()),
        **symmetry_of(model, symmetry, representation, ids[tested[:64]]),
    }


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Train all learners on shares of all pairs, and print the share of the other pairs that they answer right.

    It may be stopped, and goes on where it was. A quick look:

        python -m evaluation.experiments.symmetry.modular --tasks sums --shares 0.2 --seeds 1 --steps 200
    """
    console, seen = console or Console(), check_picture(options.picture, force=True)
    records = RunRecords(options.output, "modular", options.settings)
    with shown_progress(options.steps, console) as ticks:
        for task in options.tasks:
            for share in options.shares:
                for name in options.learners:
                    one = partial(run_one, options, task, share, name, ticks(f"{task}, {share:.0%}: {name}"))
                    rates, first = options.rates_of(name), {"task": task, "share": options.shares[0], "learner": name}
                    if share != options.shares[0]:
                        rates = records.chosen(rates, ERROR, **first)
                    further = FURTHER if share == options.shares[0] else 0
                    records.sweep(one, rates, ERROR, options.seeds, further=further, **first | {"share": share})
    shares = sorted(options.shares)
    curves: dict[str, dict[str, list[Curve]]] = {}
    for task in options.tasks:
        table = Table("learner", *(f"{share:.0%}" for share in shares), title=f"{task}: right answers to new pairs")
        curves[task] = {}
        for name in options.learners:
            runs = [records.best(ERROR, task=task, share=share, learner=name) for share in shares]
            right = [[run["test_accuracy"] for run in some] for some in runs]
            table.add_row(name, *map(spread, right))
            curves[task][name] = [list(zip(shares, one, strict=True)) for one in zip(*right, strict=True)]
        console.print(table)
    title = f"Right answers to pairs never seen, modulo {options.prime}, by the share of pairs that was seen"
    drawn = partial(draw_curves, curves, "share of pairs seen", "right answers", title=title, logarithmic=True)
    save_picture(options.picture, seen, drawn)
    return records.runs


main = program(Options, run, name="python -m evaluation.experiments.symmetry.modular")

if __name__ == "__main__":
    sys.exit(main())
