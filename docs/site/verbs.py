"""A page for every verb of `rigpt`, made of what `rigpt VERB --help` says and of the pages that speak of the verb."""

import re
from typing import Any

from links import ROOT, title, uri


# Where the verbs are explained at length; the pages of the course and what came of experiments aside.
PAGES = ("README.md", "docs/*.md", "docs/how-to/*.md")


def commands() -> dict[str, Any]:
    """Every verb, as the command that Typer makes of it."""
    import typer

    from rigpt_hf.cli import app

    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def verb_pages() -> dict[str, str]:
    """The Markdown of the pages, by where they are on the site; first a table of all of them."""
    found = commands()
    rows = [f"| [`rigpt {verb}`]({verb}.md) | {summary(command)} |" for verb, command in found.items()]
    table = ["# Every verb", "", "| verb | what it does |", "|---|---|", *rows, ""]
    return {"verbs/index.md": "\n".join(table)} | {
        f"verbs/{verb}.md": page(verb, command) for verb, command in found.items()
    }


def summary(command: Any) -> str:
    """The first sentence of a verb's help."""
    return " ".join(command.help.partition("\n\n")[0].split())


def page(verb: str, command: Any) -> str:
    """The page of one verb: usage, what it does with examples, arguments, options, and where to read on."""
    context = command.make_context(verb, [], resilient_parsing=True)
    usage = " ".join(["rigpt", verb, *(re.sub(r"[{}]", "", piece).upper() for piece in pieces(command, context))])
    lines = [f"# rigpt {verb}", "", "```text", usage, "```", "", fenced(command.help), ""]
    options = [one for one in command.params if one.param_type_name == "option"]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    lines += table("argument", arguments, context) + table("option", options, context)
    read_on = [f"- [{title(file)}](../{uri(file)})" for file in speaking_of(verb)]
    if read_on:
        lines += ["## Read on", "", *read_on, ""]
    return "\n".join(lines)


def pieces(command: Any, context: Any) -> list[str]:
    return [piece for piece in command.collect_usage_pieces(context) if piece]


def fenced(help: str) -> str:
    """The help with its indented examples as blocks of the shell."""

    def block(match: re.Match) -> str:
        return "```bash\n" + re.sub(r"^    ", "", match[0].strip("\n"), flags=re.MULTILINE) + "\n```\n"

    return re.sub(r"(?:^    .+\n?)+", block, help.strip() + "\n", flags=re.MULTILINE)


def table(kind: str, parameters: list[Any], context: Any) -> list[str]:
    """A table of arguments or options, as the help has them; nothing if there are none."""
    records = [one.get_help_record(context) for one in parameters]
    rows = [row(*record) for record in records if record is not None]
    if not rows:
        return []
    return [f"## {kind.capitalize()}s", "", f"| {kind} | default | what it is |", "|---|---|---|", *rows, ""]


def row(name: str, help: str) -> str:
    """A row: what is typed, its default, what it is."""
    text, said, notes = help.partition("  [")
    if not said and help.startswith("["):
        text, notes = "", help[1:]
    # A default in words is in parentheses, as a value of that name would be another thing.
    notes = re.sub(r"^\((.*)\)$", r"\1", notes.removesuffix("]").removeprefix("default: "))
    return f"| `{name}` | {literal(notes)} | {' '.join(text.split())} |"


def literal(text: str) -> str:
    """Text that is no markup in the cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text.strip()).replace("\\<", "&lt;")


def speaking_of(verb: str) -> list[str]:
    """The files of the repository in which a verb is called by its name."""
    files = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    called = re.compile(rf"\brigpt {verb}\b")
    return [
        str(path.relative_to(ROOT))
        for path in files
        if called.search(path.read_text(encoding="utf-8").replace("\n", " "))
    ]
