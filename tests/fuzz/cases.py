"""A case: what is drawn, and what the generators of all kinds share."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .world import COMMANDS


@dataclass
class Case:
    """
    A command line on inputs of which one is bad.

    Args:
        command: A key of `COMMANDS`.
        said: What was done, in words.
        fine: Why exit code 0 is right here; `None` if it would be wrong.
        words: The command line, that of the table if not given; paths are relative to the folder of the case.
        event: What befalls the process, see `child.py`.
    """

    command: str
    said: str
    fine: str | None = None
    words: list[str] = field(default_factory=list)
    event: dict[str, Any] = field(default_factory=dict)
    kind: str = ""

    def __post_init__(self):
        self.words = self.words or COMMANDS[self.command].words


class Draw(random.Random):
    """A seeded generator of numbers that knows the folder `work` of its case."""

    def __init__(self, seed: str, work: Path):
        super().__init__(seed)
        self.work = work

    def command(self, reads: str) -> tuple[str, str, Path]:
        """A command that looks at this in models, one of those that it is given, and its folder."""
        name = self.choice([name for name, it in COMMANDS.items() if reads in it.reads])
        model = self.choice(COMMANDS[name].models)
        return name, model, self.work / model


KINDS: dict[str, tuple[int, Callable[[Draw], Case]]] = {}


def kind(weight: int) -> Callable:
    """Register a generator, whose name is the kind, to be drawn `weight` times among all."""

    def register(generator: Callable[[Draw], Case]) -> Callable:
        KINDS[generator.__name__] = weight, generator
        return generator

    return register


def lay_out(work: Path, world: Path) -> None:
    """The good inputs, and a file of somebody else."""
    shutil.copytree(world, work / "in", symlinks=True)
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("years of work")


def make(seed: int, index: int, work: Path, world: Path) -> Case:
    """Draw a case and write its inputs into `work / "in"`; every kind once, before any comes again."""
    more = [name for name, (weight, _) in KINDS.items() for _ in range(weight - 1)]
    random.Random(0).shuffle(more)
    name = [*KINDS, *more][index % len([*KINDS, *more])]
    lay_out(work, world)
    drawn = KINDS[name][1](Draw(f"{seed} {index}", work))
    drawn.kind = name
    return drawn


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


PLACES = ("a folder", "a link to nothing", "a link to itself")
BROKEN: dict[str, Callable[[Draw, bytes], bytes]] = {
    "cut": lambda draw, old: old[: draw.randrange(max(len(old) - 3, 1))],
    "empty": lambda draw, old: b"",
    "random": lambda draw, old: draw.randbytes(200),
    "in UTF-16": lambda draw, old: old.decode("utf-8", "replace").encode("utf-16"),
    "a list": lambda draw, old: b"[1, 2]",
    "a number": lambda draw, old: b"7",
    "deep": lambda draw, old: b"[" * 100_000,
    "deep, well-formed": lambda draw, old: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "with an odd byte": lambda draw, old: b'{"a": "\xff\xfe"}',
}


def damage(draw: Draw, path: Path) -> str:
    """Damage a JSON file so that it cannot be used; what was done."""
    how = draw.choice([*BROKEN, *PLACES])
    if how in PLACES:
        misplace(path, how)
    else:
        path.write_bytes(BROKEN[how](draw, path.read_bytes()))
    return f"{path.name} is {how}"


def misplace(path: Path, how: str) -> None:
    """Put something in the place of a file or folder, which need not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if how == "a folder":
        path.mkdir(parents=True)
    else:
        os.symlink("nothing" if how == "a link to nothing" else path.name, path)
