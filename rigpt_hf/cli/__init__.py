"""The command `rigpt`: one verb per thing a person does with a model. `rigpt VERB --help` explains each."""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..version import __version__
from .cards import card
from .common import as_options
from .conversion import convert, demo, export, info, verify
from .evaluation import evaluate
from .lab import lab
from .measures import charges, diff
from .publishing import publish
from .symmetry import canonicalize, merge, rotate


app = typer.Typer(
    help="RiGPT: a GPT with no preferred basis.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
# Typer has a copy of Click of its own or uses Click's, depending on its version: the class is the parent of this one.
UsageError: Any = typer.BadParameter.__mro__[1]


def print_version(wanted: bool):
    """Print the version and stop, before a verb is asked for."""
    if wanted:
        print(f"rigpt {__version__}")
        raise typer.Exit


@app.callback(epilog="`rigpt --debug VERB ...` shows where an error comes from.")
def before_the_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
):
    """RiGPT: a GPT with no preferred basis. Convert, check, rotate and export GPT-class models."""


CONVERSION = (demo, convert, export, verify, info)
SYMMETRY = (rotate, canonicalize, diff, merge, charges)
RESULTS = (evaluate, card, publish)
LEARNING = (lab,)
for _verb in (*CONVERSION, *SYMMETRY, *RESULTS, *LEARNING):
    app.command()(_verb)


def main():
    """Entry point: bad input ends in one line that says what to do, with exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        # Outside of its standalone mode Typer raises what it would otherwise draw in a box, and returns exit codes.
        sys.exit(app(arguments or ["--help"], prog_name="rigpt", standalone_mode=False))
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "rigpt"
        fail(f"{error.format_message().rstrip('.')}. See {verb} --help")
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, (ValueError, OSError)):
            fail(as_options(str(error)))
        fail(f"{type(error).__name__}: {as_options(str(error))}. To see where it comes from, say rigpt --debug ...")


def fail(message: str):
    """One line to standard error, and exit code 2."""
    console = Console(stderr=True, soft_wrap=True)
    # Not as markup: a message may hold anything in square brackets.
    console.print(Text.assemble(("rigpt: ", "red"), message))
    sys.exit(2)
