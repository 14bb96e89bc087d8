"""The command `rigpt`: one verb per thing a person does with a model. `rigpt VERB --help` explains each."""

import sys
from typing import Annotated

import typer

from ..command_line import execute, guarded, make_app
from ..dataclass_options import command
from ..demo.options import DemoOptions
from ..training.finetune_options import FinetuneOptions
from ..training.options import PRESETS, PretrainOptions
from ..version import __version__
from .cards import card
from .compression import prune, quantize
from .conversion import convert, demo, export, families, info, verify
from .evaluation import evaluate
from .generation import generate
from .lab import lab
from .measures import charges
from .merging import merge
from .provenance import diff, fingerprint, identify
from .publishing import publish
from .symmetry import canonicalize, rotate
from .training import finetune, pretrain
from .transport import transport


app = make_app(help="RiGPT: a GPT with no preferred basis.")


def print_version(wanted: bool):
    """Print the version and stop, before a verb is asked for."""
    if wanted:
        print(f"rigpt {__version__}")
        raise typer.Exit


@app.callback(epilog="`rigpt VERB --help` explains a verb. `rigpt --debug VERB ...` shows where an error comes from.")
def before_the_verb(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop."),
    ] = None,
):
    """RiGPT: a GPT with no preferred basis. Convert, check, rotate and export GPT-class models."""


VERBS = (
    *(command(DemoOptions, demo), convert, export, verify, info, families),
    *(command(PretrainOptions, pretrain, presets=PRESETS), command(FinetuneOptions, finetune), generate),
    *(rotate, canonicalize, merge, transport, charges),
    *(fingerprint, identify, diff),
    *(quantize, prune),
    *(evaluate, card, publish),
    lab,
)
for _verb in VERBS:
    app.command()(guarded(_verb))


def main():
    """Entry point: bad input ends in one line that says what to do, with exit code 2."""
    sys.exit(execute(app, "rigpt", sys.argv[1:] or ["--help"]))
