"""Declarations of arguments and options; plain values only, so that `--help` waits for nothing."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints.source import is_free, is_model
from ..command_line import READS, WRITES


DTYPES = ("float64", "float32", "bfloat16", "float16")


def argument(text: str, default: str | None = None) -> Any:
    """A positional argument with its help; `default` says what happens without it."""
    return typer.Argument(help=text, show_default=default or True)


def option(text: str, default: str | None = None, *, name: str | None = None, **settings: Any) -> Any:
    """An option with its help; `default` says what happens without it, where the value does not."""
    return typer.Option(*([name] if name else []), help=text, show_default=default or True, **settings)


def flag(name: str, text: str, *spellings: str) -> Any:
    """An option without a value and without a `--no-` form; `spellings` are understood too."""
    return typer.Option(f"--{name}", *spellings, help=text, show_default="no")


# Arguments that many verbs take.
Source = Annotated[str, argument("RiGPT folder or Hub id."), READS, is_model]
Output = Annotated[Path, argument("Folder to make."), WRITES, is_free]
Revision = Annotated[str | None, option("Branch, tag or commit on the Hub.", "main")]
Dtype = Annotated[str | None, option(f"Of the result: {', '.join(DTYPES)}.", "as the source")]
ShardSize = Annotated[str | None, option("Largest file.", "5GB")]
Seed = Annotated[int, option("Of the inputs of the certificate.")]
Force = Annotated[
    bool, flag("force", "Replace an earlier model in OUTPUT that this program wrote and nobody changed.")
]
ForceFiles = Annotated[
    bool, flag("force", "Replace files and a model in OUTPUT that this program wrote and nobody changed.")
]
