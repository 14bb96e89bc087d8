"""
Does the symmetry of transposition pay on real music? Bach's chorales, as pitch classes and onsets: see `--help`.

A chorale is a row of tokens: for each onset the time since the one before, in sixteenths, and then the pitch classes
of the notes that begin there, from the bass up. A transposition exchanges the pitch classes cyclically. Chorales
are not spread over all keys alike, so what is exact in theory need not pay. The corpus is that of the package
music21 (`pip install music21`), which no other part of the project needs.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.demo.learners import Learner, Parts, make_model, sizes_of, symmetry_of, train
from rigpt_hf.extras import MissingPackage
from rigpt_hf.symmetry.tokens import TokenSymmetry
from rigpt_hf.terminal import Console

from ..common import check_least, ranked
from ..run_records import RunRecords, shown_progress, spread
from .options import LearnerOptions
from .pictures import draw_curves


LEARNERS = {
    "stock GPT-2": Learner("stock-gpt2", "adamw"),
    "stock GPT-2, augmentation": Learner("stock-gpt2", "adamw", sees="transposition"),
    "RiGPT": Learner(),
    "RiGPT, augmentation": Learner(sees="transposition"),
    "RiGPT, symmetry": Learner(carries="transposition"),
}
PITCHES, LONGEST_TIME = 12, 16
START, VOCABULARY = PITCHES + LONGEST_TIME, PITCHES + LONGEST_TIME + 1
# A note: its onset in quarters, and its pitch as MIDI counts.
Notes = Iterable[tuple[float, int]]
# Of ten chorales, those that choose the rates and when to stop, and those of the test.
VALIDATION, TEST = (0,), (1, 2)
MEASUREMENTS = 12
LOSS = "validation_loss"


@dataclass(frozen=True)
class Options(LearnerOptions):
    """The learners, their music, and the training."""

    chorales: int | None = None
    """How many chorales; all if not given."""
    window: int = 128
    """Tokens of a window."""
    batch: int = 16
    """Windows per step."""
    hidden_size: int = 96
    output: Annotated[Path, WRITES] = Path("runs/chorales.json")
    only: Annotated[str, {"help": f"Some of {'; '.join(LEARNERS)}; separated by semicolons."}] = ";".join(LEARNERS)

    KNOWN = LEARNERS
    DECISIVE = ("chorales", "window")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, steps=MEASUREMENTS, window=2, chorales=10)


@cache
def corpus(count: int | None) -> list[list[tuple[float, int]]]:
    """The notes of Bach's chorales, in the order of their numbers."""
    try:
        from music21 import corpus as music
        from music21.corpus import chorales
    except ImportError as error:
        raise MissingPackage("music21 is needed for this, and not installed. Run `pip install music21`.") from error
    names = list(chorales.Iterator(returnType="filename"))[:count]
    pieces = []
    for name in tqdm(names, desc="Reading chorales"):
        notes = music.parse(name).flatten().notes
        pieces.append([(float(note.offset), pitch.midi) for note in notes for pitch in note.pitches])
    return pieces


def encode(notes: Notes) -> list[int]:
    """A piece as tokens: times since the last onset, and the pitch classes that begin then, from the bass up."""
    tokens, last = [START], 0.0
    for onset, together in groupby(sorted(notes), key=lambda note: note[0]):
        sixteenths = min(max(round(4 * (onset - last)), 1), LONGEST_TIME)
        tokens += [PITCHES + sixteenths - 1, *(pitch % PITCHES for _, pitch in together)]
        last = onset
    return tokens


def transposition() -> TokenSymmetry:
    """The cyclic exchange of the pitch classes."""
    return TokenSymmetry.named("cyclic", [range(PITCHES)], vocab_size=VOCABULARY)


def windows(pieces: list[list[int]], length: int) -> torch.Tensor:
    """Pieces as windows `[windows, length]` that follow each other; a rest that is shorter is left out."""
    rows = [piece[at : at + length] for piece in pieces for at in range(0, len(piece) - length + 1, length)]
    return torch.tensor(rows)


@torch.no_grad()
def nats_per_note(model: Any, rows: torch.Tensor) -> float:
    """The mean loss of the pitch classes, given all tokens before them."""
    total, count = 0.0, 0
    for ids in rows.split(64):
        logits, asked = model(ids, use_cache=False).logits[:, :-1].double(), ids[:, 1:]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten(), reduction="none")
        notes = asked.flatten() < PITCHES
        total, count = total + float(losses[notes].sum()), count + int(notes.sum())
    return total / count


def run_one(
    options: Options, pieces: list[list[int]], name: str, tick: Callable[[int, float], None], rate: float, seed: int
) -> dict[str, Any]:
    """Train a learner on chorales, and measure others where its loss on those that choose is least."""
    of = [number % 10 for number in range(len(pieces))]
    chosen, tested = (
        windows([piece for piece, digit in zip(pieces, of, strict=True) if digit in digits], options.window)
        for digits in (VALIDATION, TEST)
    )
    rows = windows([p for p, digit in zip(pieces, of, strict=True) if digit not in VALIDATION + TEST], options.window)
    learner, symmetry = LEARNERS[name], transposition()
    model = make_model(learner, VOCABULARY, options.sizes(options.window), seed)
    draw, curve = np.random.default_rng(1000 + seed), []
    due = {round(options.steps * (n + 1) / MEASUREMENTS) for n in range(MEASUREMENTS)}

    def batch(step: int) -> Parts:
        ids = rows[torch.from_numpy(draw.integers(len(rows), size=options.batch))]
        return [(ids, ids)]

    def on_step(step: int, loss: float) -> None:
        tick(step, loss)
        if step in due:
            model.eval()
            curve.append((step, nats_per_note(model, chosen), nats_per_note(model, tested)))
            model.train()

    training: dict[str, Any] = {"steps": options.steps, "rate": rate, "seed": seed, "on_step": on_step}
    representation = train(learner, model, batch, symmetries={"transposition": symmetry}, **training)
    step, validation, test = min(curve, key=lambda point: ranked(point[1]))
    found = {"best_step": step, "validation_loss": validation, "test_loss": test, "curve": curve}
    return sizes_of(model, representation) | found | symmetry_of(model, symmetry, representation, tested[:16])


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Train all learners on chorales, and print the nats per note of held-out ones.

    It may be stopped, and goes on where it was. A quick look:

        python -m evaluation.experiments.symmetry.chorales --chorales 60 --seeds 1 --steps 100
    """
    console, seen = console or Console(), check_picture(options.picture, force=True)
    records = RunRecords(options.output, "chorales", options.settings)
    pieces = [encode(notes) for notes in corpus(options.chorales)]
    with shown_progress(options.steps, console) as ticks:
        for name in options.learners:
            one = partial(run_one, options, pieces, name, ticks(name))
            records.sweep(one, options.rates_of(name), LOSS, options.seeds, further=2, learner=name)
    best = {name: records.best(LOSS, learner=name) for name in options.learners}
    table = Table("learner", "nats per note", "best step", title="held-out chorales")
    for name, runs in best.items():
        table.add_row(name, spread([run["test_loss"] for run in runs]), spread([run["best_step"] for run in runs]))
    console.print(table)
    curves = {name: [[(step, test) for step, _, test in run["curve"]] for run in runs] for name, runs in best.items()}
    title = "Loss on chorales by Bach that were held out, along the training"
    drawn = partial(draw_curves, {"held-out chorales": curves}, "step", "nats per note", title=title)
    save_picture(options.picture, seen, drawn)
    return records.runs


main = program(Options, run, name="python -m evaluation.experiments.symmetry.chorales")

if __name__ == "__main__":
    sys.exit(main())
