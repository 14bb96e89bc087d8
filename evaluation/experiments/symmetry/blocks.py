"""
Is a model with a symmetry faster in blocks? Seconds of the same model with full maps and in blocks: see `--help`.

The model with full maps computes what a free model of its width does. Both are in one process and take turns, so that
the machine's moods fall on both. `many tokens` are all rows at once, as when prompts are read; `one token` is a row of
a single token, as when one text is written.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table

from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.demo.learners import Learner, Sizes, make_model
from rigpt_hf.demo.scan import VOCABULARY, symmetries
from rigpt_hf.evaluation.timing import ratios, spread, take_turns
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, in_blocks, symmetrize
from rigpt_hf.symmetry.tokens.filling import KINDS, RESTING
from rigpt_hf.terminal import Console

from ..common import check_known, check_least
from ..run_records import RunRecords
from .words import problem


# The group, the size of the vocabulary, and the share of all spaces in which the group does nothing.
PROBLEMS: dict[str, Callable[[], tuple[TokenSymmetry, int, float]]] = {
    "four verbs": lambda: (symmetries()["verbs"], len(VOCABULARY), RESTING),
    "octahedral": lambda: (problem("octahedral")[1], problem("octahedral")[1].vocab_size, 0.0),
}
TIMED = ("many_tokens", "one_token")
REPEATED = 8  # passes of one token that are timed together


@dataclass(frozen=True)
class Options:
    """The models, and how often they are timed."""

    groups: Annotated[list[str], {"help": f"Some of {', '.join(PROBLEMS)}."}] = field(
        default_factory=lambda: list(PROBLEMS)
    )
    kinds: Annotated[list[str], {"help": f"Some of {', '.join(KINDS)}."}] = field(default_factory=lambda: list(KINDS))
    widths: list[int] = field(default_factory=lambda: [128, 384, 768])
    """Stream sizes, multiples of `head_dim`."""
    head_dim: int = 64
    """Size of a head."""
    layers: int = 6
    """Number of layers."""
    rows: int = 16
    """Rows of `many tokens`."""
    length: int = 64
    """Tokens in each of them."""
    turns: int = 21
    """Turns, behind one that is not counted."""
    output: Annotated[Path, WRITES] = Path("runs/blocks.json")
    """File of all runs; those that it has are not made again."""

    def __post_init__(self):
        check_known("groups", self.groups, PROBLEMS)
        check_known("kinds", self.kinds, KINDS)
        check_least(self, head_dim=1, layers=1, rows=1, length=1, turns=2)
        if not all(width > 0 and width % self.head_dim == 0 for width in self.widths):
            raise ValueError(f"`widths` must be multiples of {self.head_dim}, got {self.widths}. Take others.")


@torch.no_grad()
def run_one(options: Options, group: str, kind: str, width: int) -> dict[str, Any]:
    """Time one model with full maps and in blocks, in float32; what they compute is compared in float64."""
    symmetry, vocabulary, resting = PROBLEMS[group]()
    sizes = Sizes(width, options.layers, width // options.head_dim, options.length)
    model = make_model(Learner(), vocabulary, sizes, seed=0).double()
    representation = Representation.choose(model.config, symmetry, kind=kind, resting=resting)
    model = symmetrize(model, representation).eval()
    models = {"full": model, "blocks": in_blocks(model, representation)}
    many = torch.randint(vocabulary, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    full, blocks = (one(many[:1], use_cache=False).logits for one in models.values())
    found = {"difference": float((blocks - full).abs().max() / full.abs().max())}
    for name, one in models.items():
        found[f"numbers_{name}"] = sum(parameter.numel() for parameter in one.float().parameters())

    def passes(one: Any, ids: torch.Tensor, times: int) -> None:
        for _ in range(times):
            one(ids, use_cache=False)

    for name, ids, times in zip(TIMED, (many, many[:1, :1]), (1, REPEATED), strict=True):
        actions = {key: partial(passes, one, ids, times) for key, one in models.items()}
        found[name] = take_turns(actions, options.turns, units=times)
    return found


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Time models with a symmetry with full maps and in blocks, and print how many times faster blocks are.

    It may be stopped, and goes on where it was. A quick look:

        python -m evaluation.experiments.symmetry.blocks --groups octahedral --widths 384 --layers 3 --turns 5
    """
    console = console or Console()
    settings = {name: getattr(options, name) for name in ("head_dim", "layers", "rows", "length", "turns")}
    records = RunRecords(options.output, "blocks", settings)
    columns = ("group", "representation", "width", "numbers", "many tokens", "one token")
    table = Table(*columns, title="seconds of full maps by those of blocks: median (quartiles)")
    for group in options.groups:
        for kind in options.kinds:
            for width in options.widths:
                key = {"group": group, "kind": kind, "hidden_size": width}
                found = records.run(partial(run_one, options, group, kind, width), **key)
                share = f"{found['numbers_blocks'] / found['numbers_full']:.3f}"
                table.add_row(group, kind, str(width), share, *(faster(found[name]) for name in TIMED))
    console.print(table)
    return records.runs


def faster(seconds: dict[str, list[float]]) -> str:
    """How many times faster blocks are, as a cell of the table."""
    of = spread(ratios(seconds["full"], seconds["blocks"]))
    return f"{of['median']:.2f} ({of['lower']:.2f} to {of['upper']:.2f})"


main = program(Options, run, name="python -m evaluation.experiments.symmetry.blocks")

if __name__ == "__main__":
    sys.exit(main())
