"""How every program of the project runs at the terminal: one style, and errors that end in one line."""

import re
import sys
from typing import Any

import typer

from .extras import advice


# Typer has a copy of Click of its own or uses Click's, depending on its version: the class is the parent of this one.
UsageError: Any = typer.BadParameter.__mro__[1]
# Where Python says `force=True` or `target='llama'`, a person at the terminal says `--force` or `--to llama`.
SPELLINGS = {"force": "--force", "dropout": "--dropout", "target": "--to", "frame": "--frame"}


def make_app(**options: Any) -> typer.Typer:
    """A Typer application in the style of the project: `-h` beside `--help`, Markdown, errors without boxes."""
    settings = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=settings, **options
    )


def execute(app: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """
    Run an application; bad input and failures end in one line on standard error.

    Args:
        app: What to run.
        name: How a person calls it, for the usage line and for errors.
        arguments: Those of the process if not given. Options may be spelled with `_` instead of `-`; with `--debug`
            anywhere among them, failures that are not bad usage are raised.

    Returns:
        The exit code: 2 for bad input and failures.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        # Outside of its standalone mode Typer raises what it would otherwise draw in a box, and returns exit codes.
        code = app(
            hyphenated([argument for argument in arguments if argument != "--debug"]),
            prog_name=name,
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return fail(name, usage_message(error, name))
    except typer.Abort:
        return 130
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ImportError) and (missing := advice(error)):
            return fail(name, missing)
        message = as_options(str(error))
        if not isinstance(error, (ValueError, OSError)):
            message = f"{type(error).__name__}: {message}. To see where it comes from, say {name} --debug ..."
        return fail(name, message)


def fail(name: str, message: str) -> int:
    """Write one line to standard error; the exit code 2."""
    from rich.console import Console
    from rich.text import Text

    # Not as markup: a message may hold anything in square brackets.
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{name}: ", "red"), message))
    return 2


def usage_message(error: Any, name: str) -> str:
    """The fault of a command line, in one line, and where its help is."""
    path = error.ctx.command_path if error.ctx else name
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}{'' if message.endswith('?') else '.'} See {path} --help"


def hyphenated(arguments: list[str]) -> list[str]:
    """The arguments with `--save_steps` spelled `--save-steps`; values stay."""

    def spell(argument: str) -> str:
        option, equals, value = argument.partition("=")
        return option.replace("_", "-") + equals + value if option.startswith("--") else argument

    return [spell(argument) for argument in arguments]


def as_options(message: str) -> str:
    """A message in one line, with Python's `force=True` and `target='llama'` spelled as options."""

    def spell(match: re.Match) -> str:
        name, value = match.groups()
        return f"`{SPELLINGS[name]} {value}`" if value else f"`{SPELLINGS[name]}`"

    return re.sub(rf"`({'|'.join(SPELLINGS)})=(?:True|'(\w+)')`", spell, " ".join(message.split()))
