"""A command line made of a data class: its fields are the options, its refusals end in one line."""

import inspect
from collections.abc import Callable
from typing import Any

import typer


def command(options: type, run: Callable[[Any], Any]) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """
    Decorates a function that has nothing but a name and a docstring, which becomes the help.

    Args:
        options: A data class whose fields are annotated for Typer and which raises `ValueError` for what it refuses.
        run: What is done with it; may raise `ValueError` too.
    """

    def decorate(documented: Callable[[], None]) -> Callable[..., None]:
        def main(**values: Any) -> None:
            try:
                run(options(**values))
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error

        main.__doc__, main.__name__ = documented.__doc__, documented.__name__
        main.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        main.__annotations__ = options.__annotations__
        return main

    return decorate
