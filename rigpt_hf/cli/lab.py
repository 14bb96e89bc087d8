"""The verb that draws: figures to learn from, of the course and of the library."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..command_line import WRITES
from ..extras import require
from ..status import doing
from ..terminal import Console, say_next
from .arguments import argument, flag, option
from .common import as_given, check_file, new_file


FOLDER = Path("runs/lab")


def lab(
    name: Annotated[str | None, argument("Which one, or all.", "none: list them all")] = None,
    output: Annotated[Path, option("Folder for the pictures."), WRITES] = FOLDER,
    seed: Annotated[int, option("Of everything that is drawn at random.")] = 0,
    force: Annotated[bool, flag("force", "Replace pictures that this program wrote and nobody changed.")] = False,
):
    """
    Make figures that explain RiGPT, as PNG, and say what is to be seen in them. Without a name: list them.

    The chapters of the course in docs/course run as a whole for their figures, each in under a minute.

        rigpt lab

        rigpt lab lie-groups --output pictures

        rigpt lab all --seed 1
    """
    from ..lab.registry import LABS, file_names, is_there
    from ..lab.registry import lab as known

    console = Console()
    console.soft_wrap = not console.is_terminal  # on a terminal words stay whole
    if name is None:
        table = Table("lab", "what is to be seen", "pictures")
        for each, entry in LABS.items():
            there = is_there(entry)
            table.add_row(each, entry.line, str(len(file_names(each))) if there else "not in this version")
        console.print(table)
        say_next(following(output))
        return
    require("pictures")
    names = list(LABS) if name == "all" else [name]
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, got the file {str(output)!r}. Name another one.")
    seen = {
        output / file: check_file(output / file, "output", force)
        for each in names
        if is_there(known(each))
        for file in file_names(each)
    }
    failed = []
    for each in names:
        try:
            make(each, output, seed, seen, console)
        except ValueError as error:
            if name != "all":
                raise
            failed.append(each)
            console.print(Text(f"{each}: {error}"))
    if failed:
        console.print(f"Not made: {', '.join(failed)}.")
        say_next(("rigpt", "lab"))
        raise typer.Exit(1)
    say_next(following(output, None if name == "all" else name))


def following(output: Path, name: str | None = None) -> tuple[str, ...]:
    """The command for the next lab, behind this one, whose pictures are not there; or for the list."""
    from ..lab.registry import LABS, file_names, is_there

    known = list(LABS)
    start = known.index(name) + 1 if name in LABS else 0
    elsewhere = as_given(output=None if output == FOLDER else output)
    for each in (*known[start:], *known[:start]):
        if is_there(LABS[each]) and not any((output / file).exists() for file in file_names(each)):
            return "rigpt", "lab", each, *elsewhere
    return "rigpt", "lab"


def make(name: str, output: Path, seed: int, seen: dict[Path, list[int] | None], console: Console):
    """Make the pictures of one lab; what is to be seen in each, and its path, are printed."""
    from ..lab.running import run_lab
    from ..pictures.style import encoded

    with doing(f"Making {name}"):
        shown = run_lab(name, seed)
    for each in shown:
        path = output / ("-".join(filter(None, (name, each.name))) + ".png")
        with new_file(path, "output", seen.get(path)) as place:
            place.write_bytes(encoded(each.figure))
        console.print(Text.assemble((str(path), "bold"), f": {each.seen}"))
