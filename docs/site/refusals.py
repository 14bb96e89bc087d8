"""
Every refusal that the source can word, so that the text somebody sees can be searched for.

Read from the syntax tree: a refusal is a call that makes a `ValueError`, an error of Typer, or an error that comes
from one, or what a function returns that words them for others. Where the text has a value, the page has a word for
it; parts that such a function is given are put in.
"""

import ast
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from links import ROOT


FOLDERS = ("rigpt_hf", "training", "evaluation", "model_cards")
ERRORS = {"ValueError", "UsageError", "BadParameter", "ImportError", "NotApplicable"}
# Signs of no text, around words that stand for a value.
BEGIN, END = "\ue000", "\ue001"
Scope = Mapping[str, ast.expr]


@dataclass(frozen=True)
class Refusal:
    """A text with words for its values between [`BEGIN`] and [`END`], and where it is worded."""

    text: str
    file: str
    line: int

    @property
    def plain(self) -> str:
        """The text without signs around words for values."""
        return self.text.replace(BEGIN, "").replace(END, "")


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax trees of the product, by path in the repository; experiments, which are in no wheel, aside."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    names = {str(path.relative_to(ROOT)): path for path in paths}
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in names.items()
        if not name.startswith("evaluation/experiments/")
    }


def last(node: ast.AST) -> str:
    """The last part of a dotted name, or nothing."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@cache
def errors() -> frozenset[str]:
    """The names of errors that refuse, those of the product among them."""
    classes = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    known, before = set(ERRORS), 0
    while len(known) > before:
        before = len(known)
        known |= {node.name for node in classes if known & {last(base) for base in node.bases}}
    return frozenset(known)


@cache
def constants() -> dict[str, ast.expr]:
    """Texts that modules give a name in capitals."""
    return {
        last(node.targets[0]): node.value
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.Assign) and last(node.targets[0]).isupper() and is_text(node.value)
    }


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def refusals() -> list[Refusal]:
    """All of them, in the order of files and lines, each text once in a file."""
    found: dict[tuple[str, str], Refusal] = {}

    def add(file: str, line: int, texts: Iterable[str]) -> None:
        for text in texts:
            if len(re.sub(rf"{BEGIN}.*?{END}|\W", "", text)) > 10:  # else it is somebody else's text
                found.setdefault((file, text), Refusal(" ".join(text.split()), file, line))

    everywhere = {name: maker for file in trees() for name, maker in makers(file).items()}
    spoken = set[str]()
    for file, tree in trees().items():
        own = makers(file)
        inside = {id(call) for maker in own.values() for call in ast.walk(maker)}
        for function, call in calls(tree):
            name = last(call.func)
            if name in errors() and call.args and id(call) not in inside:
                add(file, call.lineno, [template(call.args[0], scope_of(function, call.lineno))])
            elif maker := own.get(name, everywhere.get(name)):
                spoken.add(name)
                add(file, call.lineno, made(maker, call, scope_of(function, call.lineno)))
    for file in trees():
        for name, maker in makers(file).items():
            if name not in spoken:  # it is passed on, and called elsewhere
                add(file, maker.lineno, (template(text, scope_of(maker, text.lineno)) for text in worded_by(maker)))
    return list(found.values())


@cache
def makers(file: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file that word refusals for others: they return an error, or the text of one."""
    functions = [node for node in ast.walk(trees()[file]) if isinstance(node, ast.FunctionDef)]
    inner = {node for outer in functions for node in ast.walk(outer) if node is not outer}
    return {node.name: node for node in functions if node not in inner and node.returns and worded_by(node)}


@cache
def worded_by(maker: ast.FunctionDef) -> tuple[ast.expr, ...]:
    """The texts of a function that words refusals for others."""
    if last(maker.returns or maker) in errors():
        every = (node for node in ast.walk(maker) if isinstance(node, ast.Call) and last(node.func) in errors())
        return tuple(call.args[0] for call in every if call.args)
    if "str | None" not in ast.unparse(maker.returns or maker):
        return ()
    returned = (node.value for node in ast.walk(maker) if isinstance(node, ast.Return) and node.value is not None)
    sides = (
        side
        for value in returned
        for side in ([value.body, value.orelse] if isinstance(value, ast.IfExp) else [value])
    )
    # A refusal begins with the argument; other texts are names and notes.
    return tuple(side for side in sides if is_text(side) and template(side, {}).startswith("`"))


def calls(tree: ast.AST, function: ast.FunctionDef | None = None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Every call, with the innermost function that it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield function, node
        yield from calls(node, node if isinstance(node, ast.FunctionDef) else function)


def made(maker: ast.FunctionDef, call: ast.Call, scope: Scope) -> Iterator[str]:
    """The texts of a function that words refusals for others, with what a call gives it."""
    names = [argument.arg for argument in (*maker.args.posonlyargs, *maker.args.args)]
    given = dict(zip(names, call.args, strict=False)) | {word.arg: word.value for word in call.keywords if word.arg}
    texts = {name: ast.Constant(template(value, scope)) for name, value in given.items() if is_worded(value, scope)}
    for text in worded_by(maker):
        yield template(text, {**scope_of(maker, text.lineno), **texts})


def is_worded(node: ast.expr, scope: Scope) -> bool:
    """Whether an argument is text that is written there, and no value."""
    if isinstance(node, ast.Name):
        node = scope.get(node.id, constants().get(node.id, node))
    if isinstance(node, ast.IfExp):
        return is_worded(node.body, scope) and is_worded(node.orelse, scope)
    return is_text(node)


def scope_of(function: ast.FunctionDef | None, line: int) -> dict[str, ast.expr]:
    """The texts that have a name at a line of a function, by what was last said before."""
    said: dict[str, ast.expr] = {}
    for name, value in assigned(function) if function else ():
        if value.lineno < line:
            said[name] = value
    return {name: value for name, value in said.items() if is_worded(value, {})}


@cache
def assigned(function: ast.FunctionDef) -> list[tuple[str, ast.expr]]:
    """Names that a function gives, and the values, in the order of lines."""
    nodes = [
        node for node in ast.walk(function) if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    return [(last(node.targets[0]), node.value) for node in sorted(nodes, key=lambda node: node.lineno)]


def template(node: ast.expr, scope: Scope, depth: int = 0) -> str:
    """A text with words for its values."""
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=values):
            return "".join(template(value, scope, depth) for value in values)
        case ast.FormattedValue(value=value):
            return template(value, scope, depth)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left, scope, depth) + template(right, scope, depth)
        case ast.IfExp(body=body, orelse=orelse) if is_worded(body, scope) and is_worded(orelse, scope):
            both = [template(side, scope, depth) for side in (body, orelse)]
            return f"{BEGIN}{' / '.join(filter(None, (re.sub(f'[{BEGIN}{END}]', '', one) for one in both)))}{END}"
        case ast.Call(func=ast.Attribute(value=value, attr="strip")) if is_text(value):
            return template(value, scope, depth)
        case ast.Name(id=name) if depth < 3 and (name in scope or name in constants()):
            return template(scope.get(name, constants().get(name, node)), scope, depth + 1)
        case _:
            return f"{BEGIN}{words(node)}{END}"


def words(node: ast.AST) -> str:
    """Words for a value, out of the first name in what the source says of it; names that are called say less."""
    called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
    names = [last(each) for each in ast.walk(node) if id(each) not in called and not last(each).startswith("__")]
    name = next(filter(None, names), "value").strip("_").replace("_", " ")
    is_number = isinstance(node, ast.Call) and last(node.func) == "len"
    return f"number of {name}" if is_number else name


# A message that is pasted finds its refusal, and a few words a page that explains.
INTRODUCTION = """---
search:
  boost: 0.8
---

# Troubleshooting

A verb or program that refuses says so in one line: the argument in backticks, the rule, the value that it got, and
what to do next. Search for the words of that line that are no name and no number of yours: all {count} of these texts
are below, with *words in italics* where yours has a value. At the terminal an argument is spelled as it is typed
there: `output` is `OUTPUT`, `dry_run` is `--dry-run`.

`rigpt --debug VERB ...` shows where an error comes from. The exit code is 2 after bad input and failures, 1 where a
verb answered no, 130 and 143 after signals.

## Models that do not convert
"""


def troubleshooting() -> str:
    """The Markdown of the page: by folder, and in it by file."""
    found = refusals()
    lines = [INTRODUCTION.format(count=f"{len(found):,}")]
    (reasons,) = (
        node.value
        for node in trees()["rigpt_hf/conversion/families.py"].body
        if isinstance(node, ast.Assign) and last(node.targets[0]) == "REASONS"
    )
    lines += [f"- `{name}`: {reason}" for name, reason in ast.literal_eval(reasons).items()]
    folder = file = ""
    for one in sorted(found, key=lambda one: (str(Path(one.file).parent), one.file, one.line)):
        if (parent := str(Path(one.file).parent)) != folder:
            folder = parent
            lines += ["", f"## {folder}"]
        if one.file != file:
            file = one.file
            lines += ["", f"### {Path(file).name}", "", about(file), ""]
        # A heading each, as the search finds sections, and those first whose heading has the words.
        lines += [f"#### {marked(one.text.replace(END + BEGIN, f'{END} {BEGIN}'))} {{ .refusal }}", ""]
    return "\n".join(lines) + "\n"


def about(file: str) -> str:
    """The first sentence of a file's docstring."""
    said = " ".join((ast.get_docstring(trees()[file]) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", said)[0]


def marked(text: str) -> str:
    """A text as Markdown: code in backticks, values in italics, and all else as it is."""
    parts = re.split(r"`([^`]+)`", text)
    for index, part in enumerate(parts):
        kept = re.sub(r"([\\`*_\[\]#|{}])", r"\\\1", html.escape(part, quote=False))
        kept = kept.replace(BEGIN, "<em>").replace(END, "</em>")
        parts[index] = f"<code>{kept}</code>" if index % 2 else kept
    return "".join(parts)
