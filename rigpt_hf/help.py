"""How `--help` looks: one name to a line, none cut, and examples as they are typed."""

import re
from typing import Any

import typer
from typer.core import TyperCommand


# The class of Typer's own copy of Click or of Click itself.
UsageError: Any = typer.BadParameter.__mro__[1]


class Command(TyperCommand):
    """A verb or program with such a help."""

    def __init__(self, *args: Any, **settings: Any):
        # As text, not as a table, in whose narrow columns long names end in dots.
        super().__init__(*args, **settings | {"rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """As ever; a fault that is found while words are told apart belongs to this command, too."""
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_help_text(self, ctx: Any, formatter: Any):
        """The text of the help; lines after a backspace are not joined."""
        shown = []
        for part in re.split(r"\n\s*\n", (self.help or "").strip()):
            if not part.startswith("    "):
                shown.append(part)
            elif shown and shown[-1].startswith("\b"):
                shown[-1] += f"\n{part}"
            else:
                shown.append(f"\b\n{part}")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("\n\n".join(shown))

    def format_options(self, ctx: Any, formatter: Any):
        """Arguments and options, in the panels that they are declared for."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


class App(typer.Typer):
    """An application of Typer's whose commands are of [`Command`]."""

    def command(self, *args: Any, **settings: Any) -> Any:
        return super().command(*args, **{"cls": Command} | settings)
