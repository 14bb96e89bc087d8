"""Seconds of a training step of the recipes that `compare.py` trains, side by side.

    python -m evaluation.experiments.step_time --only stock-gpt2,rigpt,recipe

Runs of minutes on a shared machine say little about speed. Here all recipes are in one process and take turns, a whole
step each, forward, backward and optimizer, so that the machine's moods fall on all of them.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.table import Table
from tqdm.auto import tqdm

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.evaluation.harness.statistics import paired_ratio
from rigpt_hf.evaluation.timing import ratios, take_turns
from rigpt_hf.symmetry.tokens import Representation, SymmetricTraining, TokenSymmetry
from rigpt_hf.terminal import Console
from rigpt_hf.training.build import build_model, build_optimizer

from .candidates import CANDIDATES
from .common import check_known, check_least, training_step, write_json
from .compare import BATCH, CONTEXT, MICRO_BATCH, VOCABULARY, spread


# Behind the name of a recipe that keeps a symmetry.
SYMMETRIC = ", symmetric"


@dataclass(frozen=True)
class Options:
    """The recipes whose steps are timed, and how often."""

    only: Annotated[
        list[str], {"help": f"Some of: {', '.join(CANDIDATES)}; separated by commas; ratios are to the first."}
    ] = field(default_factory=lambda: ["stock-gpt2", "rigpt", "recipe", "modern-tuned"])
    turns: int = 11
    """Steps of each, behind one that is not counted."""
    precision: Literal["no", "bf16"] = "bf16"
    """no (float32), or bf16: mixed precision."""
    symmetry: bool = False
    """Time the first of them also as it keeps a symmetry of the data: all exchanges of four tokens."""
    output: Annotated[Path | None, WRITES] = None
    """File for the numbers, JSON."""

    def __post_init__(self):
        check_known("only", self.only, CANDIDATES)
        check_least(self, turns=2)
        if self.symmetry and CANDIDATES[self.only[0]].model.model_kind != "rigpt":
            raise ValueError(f"`symmetry` needs a RiGPT as the first of `only`, got {self.only[0]!r}. Name rigpt.")


def run(options: Options) -> None:
    """Time training steps of recipes in turns, and print their ratios with 95 % confidence intervals."""
    seen = check_file(options.output, "output", force=True)
    first = options.only[0]
    names = [*options.only, *[first + SYMMETRIC] * options.symmetry]
    seconds = measure(names, options.turns, options.precision == "bf16")
    relative = {name: ratios(seconds[name], seconds[first]) for name in names}
    table = Table("recipe", "seconds per step", f"relative to {first}", title=f"{BATCH * CONTEXT} tokens per step")
    for name in names:
        table.add_row(name, spread(seconds[name], "{:.3f}"), geometric(relative[name]))
    Console().print(table)
    how = {"torch": torch.__version__, "threads": torch.get_num_threads(), "precision": options.precision}
    how |= {"tokens": BATCH * CONTEXT, "seconds": seconds, "ratios": relative}
    write_json(options.output, how, seen=seen, named=True)


def measure(names: list[str], turns: int, mixed: bool) -> dict[str, list[float]]:
    """Seconds of every step of every recipe, on random tokens."""
    micro = math.gcd(MICRO_BATCH, BATCH)
    ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0)).split(micro)
    steps = {name: step_of(name, ids, mixed) for name in names}
    with tqdm(total=turns + 1, desc="Turns") as bar:
        return take_turns(steps, turns, bar.update)


def step_of(name: str, rows: tuple[torch.Tensor, ...], mixed: bool) -> Callable[[], float]:
    """A whole training step of a recipe, at a rate that changes nothing to speak of."""
    candidate = CANDIDATES[name.removesuffix(SYMMETRIC)]
    model: Any = build_model(candidate.model, VOCABULARY, CONTEXT, None, 0)
    optimizer = build_optimizer(replace(candidate.optimizer, learning_rate=1e-6), model)
    if name.endswith(SYMMETRIC):
        symmetry = TokenSymmetry.named("symmetric", [range(1, 5), range(5, 9)], VOCABULARY)
        training = SymmetricTraining(model, Representation.choose(model.config, symmetry))
        training.begin_(optimizer)
        optimizer.register_step_pre_hook(lambda *_: training.project_gradients_())
    return lambda: training_step(model, optimizer, rows, max_grad_norm=1.0, mixed=mixed)


def geometric(values: list[float]) -> str:
    """The geometric mean of ratios and its 95 % confidence interval (Student's t of their logarithms), as text."""
    mean = paired_ratio(values)
    # Ratios that are all alike have no spread.
    low, high = (mean.value if math.isnan(end) else end for end in (mean.low, mean.high))
    return f"{mean.value:.2f} ({low:.2f} to {high:.2f})"


main = program(Options, run, name="python -m evaluation.experiments.step_time")

if __name__ == "__main__":
    sys.exit(main())
