"""`rigpt demo symmetry`: a word is used in ways in which it was never seen, by a model that carries a symmetry."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..checkpoints.folder import check_output, new_folder
from ..pictures import save
from ..pictures.symmetry import draw_generalisation
from ..terminal import Console
from .commands import Commands, share_right
from .learners import Learner, Sizes, make_model, sizes_of, symmetry_of, train
from .options import DemoOptions
from .run import quiet_library
from .scan import ANSWER, END, IDS, PAD, START, VOCABULARY, grammar, symmetries


STOCK, FREE, SYMMETRIC = "stock GPT-2", "RiGPT", "RiGPT with the symmetry"
# Each at the best of its three rates for this budget, by the loss on commands that are kept back: `python -m
# evaluation.experiments.symmetry.scan --longest 16 --hidden-size 96 --steps 400 --splits add-jump --seeds 1`.
LEARNERS = {
    STOCK: (Learner("stock-gpt2", "adamw"), 3e-3),
    FREE: (Learner(), 5e-3),
    SYMMETRIC: (Learner(carries="verbs"), 2e-3),
}
# Stream, layers and heads.
SHAPE = 96, 3, 4
LONGEST, BATCH, MEASUREMENTS, SAMPLE = 16, 64, 6, 128
SHOWN = ("jump twice", "look after jump left", "jump around right and walk")


@dataclass
class Found:
    """
    The results of a learner.

    Args:
        parameters, free_parameters: How many numbers it has, and how many of them it may choose.
        others, jump: Shares of new commands that it answers right: those without and those with "jump".
        curve: Steps with both shares of a sample.
        answers: To the commands that are shown.
        symmetry_error: How far it is from the symmetry, in nats.
        seconds: Of its training.
    """

    parameters: int
    free_parameters: int
    others: float
    jump: float
    curve: list[tuple[int, float, float]]
    answers: list[str]
    symmetry_error: float
    seconds: float = field(default=0.0, compare=False)


def run_symmetry_demo(options: DemoOptions, console: Console | None = None) -> Path:
    """
    Run the demo and return the path of its report.

    Raises:
        ValueError: if an option is impossible or the output exists and `force` is not given.
    """
    console = console or Console()
    seen = check_output(options.folder, None, options.force, "output")
    commands = Commands("add-jump", LONGEST)
    shown = next(one for one in commands.trained if one.command[0] == "run" and "and" in one.command)
    console.rule("[bold]A word in new company", align="left")
    console.print(
        f'{len(commands.trained)} commands to train on, such as "{" ".join(shown.command)}", and '
        f'"jump" alone. In {len(commands.test)} commands, kept for the test, "jump" stands beside other words.\n'
        "The symmetry exchanges the four verbs, in commands and in actions.",
        highlight=False,
    )
    found = {}
    with quiet_library(), Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        for name in LEARNERS:
            bar = progress.add_task(name, total=options.training_steps)
            found[name] = learn(name, commands, options, lambda step, bar=bar: progress.update(bar, completed=step))
    show(found, console)
    with new_folder(options.folder, seen, "output") as folder:
        save(draw_generalisation({name: one.curve for name, one in found.items()}), folder / "add-jump.png")
        (folder / "report.md").write_text(markdown(found, options), encoding="utf-8")
    report = options.folder / "report.md"
    console.rule("[bold green]Done", align="left")
    console.print(f"Report: {report}\nFigure: {options.folder / 'add-jump.png'}", markup=False)
    return report


def learn(name: str, commands: Commands, options: DemoOptions, tick: Any) -> Found:
    """Train a learner, and measure it along the way and at the end."""
    learner, rate = LEARNERS[name]
    symmetry = symmetries()["verbs"]
    model = make_model(learner, len(VOCABULARY), Sizes(*SHAPE, commands.longest), options.seed)
    curve: list[tuple[int, float, float]] = []
    due = {round(options.training_steps * (n + 1) / MEASUREMENTS) for n in range(MEASUREMENTS)}

    def on_step(step: int, loss: float) -> None:
        tick(step)
        if step in due:
            model.eval()
            familiar, new = (
                share_right(model, some)[1] for some in (commands.kept_back[:SAMPLE], commands.sample(SAMPLE))
            )
            curve.append((step, familiar, new))
            model.train()

    began = time.perf_counter()
    representation = train(
        learner,
        model,
        commands.batches(BATCH, options.seed + 1000),
        steps=options.training_steps,
        rate=rate,
        seed=options.seed,
        symmetries={"verbs": symmetry},
        on_step=on_step,
    )
    return Found(
        **sizes_of(model, representation),
        others=share_right(model, commands.kept_back)[1],
        jump=share_right(model, commands.test)[1],
        curve=curve,
        answers=[answer(model, command) for command in SHOWN],
        symmetry_error=symmetry_of(model, symmetry, None, commands.asked[:64])["symmetry_error_max"],
        seconds=time.perf_counter() - began,
    )


def answer(model: Any, command: str) -> str:
    """The answer that a model generates, greedily, for a command."""
    asked = torch.tensor([[START, *map(IDS.get, command.split()), ANSWER]])
    room = model.config.max_position_embeddings - asked.shape[1]
    ids = model.generate(asked, do_sample=False, max_new_tokens=room, eos_token_id=END, pad_token_id=PAD)[0]
    return " ".join(VOCABULARY[token] for token in ids[asked.shape[1] :].tolist() if token not in (END, PAD))


def show(found: dict[str, Found], console: Console) -> None:
    """The table of shares, and the answers side by side."""
    table = Table("", "may choose", "new commands, other verbs", "new commands with jump", title="Right answers")
    for name, one in found.items():
        colour = "green" if one.jump > 0.9 else "red"
        table.add_row(name, f"{one.free_parameters:,} numbers", f"{one.others:.1%}", f"[{colour}]{one.jump:.1%}")
    console.print(table)
    for number, command in enumerate(SHOWN):
        console.print(Text(command, style="bold"))
        for name, one in found.items():
            right = one.answers[number] == meaning(command)
            console.print(Text(f"  {name:<24}", end=""), Text(one.answers[number], style="green" if right else "red"))


def meaning(command: str) -> str:
    """The right answer."""
    return next(" ".join(one.actions) for one in grammar() if one.command == tuple(command.split()))


def markdown(found: dict[str, Found], options: DemoOptions) -> str:
    """The page."""
    rows = "\n".join(
        f"| {name} | {one.free_parameters:,} | {one.others:.1%} | {one.jump:.1%} | {one.symmetry_error:.2g} |"
        for name, one in found.items()
    )
    answers = "\n".join(
        f"| {command} | {name} | {said} | {'right' if said == meaning(command) else 'wrong'} |"
        for number, command in enumerate(SHOWN)
        for name, said in ((name, one.answers[number]) for name, one in found.items())
    )
    times = ", ".join(f"{name} {one.seconds:.0f} s" for name, one in found.items())
    return f"""# A word in new company

SCAN (Lake and Baroni 2018) has commands and the actions that they mean. All three models saw "jump" on its own, and
every other verb in all kinds of commands: answers of at most {LONGEST} actions, {options.training_steps} steps of
{BATCH} commands, seed {options.seed}. The symmetry exchanges the four verbs in commands and in actions: relabelling
tokens is a change of frame of that model, before the training, during it and after.

![Right answers along the training](add-jump.png)

| | numbers to choose | new commands, other verbs | new commands with jump | error of the symmetry, nats |
|---|---|---|---|---|
{rows}

| command | | answer | |
|---|---|---|---|
{answers}

Time of training and measuring: {times}. More of this kind, with intervals: `docs/data-symmetry.md`.
"""
