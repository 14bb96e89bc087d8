"""
Does a model that carries a symmetry use words in ways in which it never saw them? All of SCAN: see `--help`.

The splits keep commands away from training, such as all in which "jump" stands beside other words. A symmetry that
exchanges verbs, in commands and in actions, says what they mean. Rates are swept on the first split with the first
seed, by the loss on commands of the training split that were kept back, and hold for all splits.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.demo.commands import Commands, share_right
from rigpt_hf.demo.learners import Learner, make_model, sizes_of, symmetry_of, train
from rigpt_hf.demo.scan import VOCABULARY, symmetries
from rigpt_hf.terminal import Console

from ..common import check_known, check_least
from ..run_records import RunRecords, shown_progress, spread
from .options import LearnerOptions
from .pictures import draw_shares
from .stock import StockSymmetry


BOTH = "verbs and directions"
LEARNERS = {
    "stock GPT-2": Learner("stock-gpt2", "adamw"),
    "RiGPT": Learner(),
    "RiGPT, verbs": Learner(carries="verbs"),
    "RiGPT, verbs and directions": Learner(carries=BOTH),
    "RiGPT, permutations": Learner(carries=BOTH, kind="permutation"),
    "RiGPT, augmentation": Learner(sees=BOTH),
}
# What of it needs a network without a preferred basis, and what AdamW costs.
OTHERS = {
    "stock GPT-2, permutations": Learner("stock-gpt2", "adamw", carries=BOTH, kind="permutation"),
    "RiGPT, permutations, AdamW": Learner(optim="adamw", carries=BOTH, kind="permutation"),
    "RiGPT, verbs and directions, AdamW": Learner(optim="adamw", carries=BOTH, project_weights=True),
}
ALL = LEARNERS | OTHERS
LOSS = "kept_back_loss"  # by which rates are chosen
SPLITS = ("add-jump", "around-right", "simple", "add-turn-left", "length")


@dataclass(frozen=True)
class Options(LearnerOptions):
    """The learners, the splits, and the training."""

    splits: Annotated[list[str], {"help": f"Some of {', '.join(SPLITS)}.", "show_default": "all"}] = field(
        default_factory=lambda: list(SPLITS)
    )
    longest: int | None = None
    """Only commands with answers of at most so many actions; all of SCAN if not given."""
    steps: int = 1500
    hidden_size: int = 128
    output: Annotated[Path, WRITES] = Path("runs/scan.json")
    only: Annotated[str, {"help": f"Some of {'; '.join(ALL)}; separated by semicolons."}] = ";".join(LEARNERS)

    KNOWN = ALL
    DECISIVE = ("longest",)

    def __post_init__(self):
        super().__post_init__()
        check_known("splits", self.splits, SPLITS)
        check_least(self, longest=4)
        for name in self.splits:
            Commands(name, self.longest)


def run_one(
    options: Options, split_name: str, name: str, tick: Callable[[int, float], None], rate: float, seed: int
) -> dict[str, Any]:
    """Train a learner on a split and ask it for all other commands."""
    learner, commands, known = ALL[name], Commands(split_name, options.longest), symmetries()
    model = make_model(learner, len(VOCABULARY), options.sizes(commands.longest), seed)
    training: dict[str, Any] = {
        "steps": options.steps,
        "rate": rate,
        "seed": seed,
        "symmetries": known,
        "on_step": tick,
    }
    if learner.model == "stock-gpt2" and learner.carries is not None:
        training["keeper"] = StockSymmetry(model, known[learner.carries], learner.resting)
    representation = train(learner, model, commands.batches(options.batch, 1000 + seed), **training)
    loss, kept_back = share_right(model, commands.kept_back)
    _, test = share_right(model, commands.test)
    return {
        **sizes_of(model, representation),
        "kept_back_loss": loss,
        "kept_back_accuracy": kept_back,
        "test_accuracy": test,
        **symmetry_of(model, known[learner.carries or BOTH], representation, commands.asked[:64]),
    }


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Train all learners on splits of SCAN and print the share of the held-out commands that they answer right.

    All of it takes some five hours on one core. It may be stopped, and goes on where it was. A quick look:

        python -m evaluation.experiments.symmetry.scan --splits add-jump --seeds 1 --longest 16 --steps 300
    """
    console, seen = console or Console(), check_picture(options.picture, force=True)
    records = RunRecords(options.output, "scan", options.settings)
    with shown_progress(options.steps, console) as ticks:
        for split_name in options.splits:
            for name in options.learners:
                one = partial(run_one, options, split_name, name, ticks(f"{split_name}: {name}"))
                rates = options.rates_of(name)
                if split_name != SPLITS[0]:
                    rates = records.chosen(rates, LOSS, split=SPLITS[0], learner=name)
                records.sweep(one, rates, LOSS, options.seeds, split=split_name, learner=name)
    shares = {
        split_name: {
            name: [run["test_accuracy"] for run in records.best(LOSS, split=split_name, learner=name)]
            for name in options.learners
        }
        for split_name in options.splits
    }
    table = Table("learner", *options.splits, title="held-out commands that are answered right, as a share")
    for name in options.learners:
        table.add_row(name, *(spread(column[name]) for column in shares.values()))
    console.print(table)
    title = "New commands that are answered right: every dot is a seed, every bar their mean"
    save_picture(options.picture, seen, lambda: draw_shares(shares, "answered right", title=title))
    return records.runs


main = program(Options, run, name="python -m evaluation.experiments.symmetry.scan")

if __name__ == "__main__":
    sys.exit(main())
