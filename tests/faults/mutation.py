"""One-line faults of Python code, stated by meaning: what is changed, in which function, whatever stands around it.

A fault names a function and one of its statements, as `ast.unparse` writes it; of a compound statement (`if`, `for`,
`def`, ...) only the header counts. So it can be made again after lines have moved, comments changed, or the function
has found another file.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


HEADERS = (ast.If, ast.While, ast.For, ast.With, ast.FunctionDef)
UNTOUCHED = (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert, ast.Global, ast.Nonlocal, ast.Delete, ast.Pass)
# Statements that only speak or draw: a fault in them changes a word or a colour.
SPEAKING = {"print", "logger", "logging", "log", "warnings", "typer", "console", "tqdm", "say", "progress", "bar"}
DRAWING = {"ax", "axes", "plt", "figure", "fig", "panel", "cell"}
DRAWING_CALLS = {"add_row", "add_column", "set_title"}
# Arguments that hardly change what is computed, and calls that do not mind the order of theirs.
IDLE_ARGUMENTS = {"strict", "seed", "verbose", "parents", "exist_ok", "dpi", "figsize"}
SYMMETRIC = {"min", "max", "minimum", "maximum", "promote_types", "equal", "allclose", "isclose", "gcd"}
LONGEST = 240  # A longer statement seldom survives until the fault is made again.
BINARY = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult},
    **{
        ast.FloorDiv: ast.Mod,
        ast.Mod: ast.FloorDiv,
        ast.MatMult: ast.Mult,
        ast.BitOr: ast.BitAnd,
        ast.BitAnd: ast.BitOr,
    },
}
COMPARED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}


class NowhereError(LookupError):
    """The statement that a fault changes does not occur in the product, or in more places than one."""


@dataclass(frozen=True)
class Statement:
    """One statement (or header) of a file: the function it stands in, its text, and its extent in bytes."""

    scope: str
    text: str
    node: ast.stmt
    start: int
    end: int


def head(node: ast.stmt) -> ast.stmt:
    """The statement itself; of a compound one its header, without decorators."""
    if not isinstance(node, HEADERS):
        return node
    node = copy.copy(node)
    for name in {"body", "orelse", "decorator_list"} & set(node._fields):
        setattr(node, name, [])
    return node


@cache
def statements(source: str) -> tuple[Statement, ...]:
    """All simple statements and headers of a source, outermost first; `<module>` is the scope of the top level."""
    data = source.encode()
    offsets = [0]
    for line in data.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))

    def end_of(node: ast.AST) -> int:
        return offsets[node.end_lineno - 1] + node.end_col_offset

    def end_of_header(node: ast.stmt) -> int:
        parts = [part for part in list(ast.walk(head(node)))[1:] if hasattr(part, "end_lineno")]
        return data.index(b":", max(map(end_of, parts), default=offsets[node.lineno - 1])) + 1

    def visit(body: list, scope: str):
        for node in body:
            start = offsets[node.lineno - 1] + node.col_offset
            inside = ".".join(part for part in (scope.replace("<module>", ""), getattr(node, "name", "")) if part)
            named = inside if isinstance(node, ast.FunctionDef) else scope
            if isinstance(node, HEADERS):
                yield Statement(named, ast.unparse(head(node)), node, start, end_of_header(node))
            elif not isinstance(node, ast.ClassDef | ast.Try | ast.Match | ast.AsyncFunctionDef):
                yield Statement(named, ast.unparse(node), node, start, end_of(node))
            below = inside if isinstance(node, ast.FunctionDef | ast.ClassDef) else scope
            for name in ("body", "orelse", "finalbody"):
                yield from visit(getattr(node, name, []), below)
            for branch in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from visit(branch.body, below)

    return tuple(visit(ast.parse(source).body, "<module>"))


def variants(statement: Statement) -> Iterator[tuple[str, str]]:
    """All faults (kind, new text) of one statement; none where it raises, imports, speaks, draws or documents."""
    node = statement.node
    parts = list(ast.walk(head(node)))
    roots = {part.id for part in parts if isinstance(part, ast.Name)}
    methods = {part.attr for part in parts if isinstance(part, ast.Attribute)}
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    idle = roots & (SPEAKING | DRAWING | {"__all__"}) or methods & DRAWING_CALLS or "draw" in statement.scope
    if isinstance(node, UNTOUCHED) or constant or idle or len(statement.text) > LONGEST:
        return
    if _droppable(node):
        yield "dropped", "pass"
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.UnaryOp | ast.Compare | ast.BoolOp):
        yield "negated", statement.text.replace(ast.unparse(node.test), f"not {ast.unparse(node.test)}", 1)
    blank = head(node)
    places = [blank, *_expressions(blank)]
    for index, place in enumerate(places):
        for kind, change in _changes(place, default=isinstance(node, ast.FunctionDef | ast.AnnAssign)):
            other = copy.deepcopy(blank)
            change([other, *_expressions(other)][index])
            new = ast.unparse(ast.fix_missing_locations(other))
            if new != statement.text:
                yield kind, new


def locate(sources: dict[str, str], fault: dict) -> tuple[str, Statement]:
    """Where a fault can be made now: (path, statement).

    Looked for in this order: the same function of the same file, a function of that name in that file, a function of
    that name anywhere, and, for a text long enough to be nobody else's, any function at all.

    Args:
        sources: path to source of all files of the product.
        fault: with `file`, `function`, `old` and, where a function has the statement more than once, `nth`; and
            `again`, hand-written statements of the same meaning in newer code, which come first.

    Raises:
        NowhereError: if it is found nowhere, or equally well in several places.
    """
    for stated in [*fault.get("again", []), fault]:
        old, name, number = stated["old"], stated["function"].rpartition(".")[2], stated.get("nth", 0)
        here = [(stated["file"], s) for s in statements(sources.get(stated["file"], "")) if s.text == old]
        named = [hit for hit in here if hit[1].scope == stated["function"]]
        if len(named) > number:
            return named[number]
        everywhere = [(path, s) for path, text in sources.items() for s in statements(text) if s.text == old]
        for hits in (
            [hit for hit in here if hit[1].scope.rpartition(".")[2] == name],
            [hit for hit in everywhere if hit[1].scope.rpartition(".")[2] == name],
            everywhere if len(old) >= 30 else [],
        ):
            if len(hits) > number and len({(path, found.scope) for path, found in hits}) == 1:
                return hits[number]
    raise NowhereError(
        f"`{fault['old']}` of `{fault['function']}` ({fault['file']}) stands nowhere in the product, or in more "
        "places than one; add the same meaning in the new code to its list `again`"
    )


def applied(sources: dict[str, str], fault: dict) -> tuple[str, str]:
    """The path to change and its source with the fault; raises `NowhereError` as `locate` does."""
    path, place = locate(sources, fault)
    stated = next(s for s in [*fault.get("again", []), fault] if s["old"] == place.text)
    data = sources[path].encode()
    new = stated["new"].encode()
    if data[place.start :].startswith(b"elif"):
        new = b"el" + new
    return path, (data[: place.start] + new + data[place.end :]).decode()


def product(tree: Path, folders: list[str]) -> dict[str, str]:
    """Path (relative to the tree) to source of all Python files in the folders."""
    files = sorted(file for folder in folders for file in (tree / folder).rglob("*.py"))
    return {str(file.relative_to(tree)): file.read_text(encoding="utf-8") for file in files}


def _droppable(node: ast.stmt) -> bool:
    """Calls for their effect, and assignments to something that exists without them."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        target, names = node.targets[0], {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        return not isinstance(target, ast.Name | ast.Tuple) or (isinstance(target, ast.Name) and target.id in names)
    return isinstance(node, ast.AugAssign | ast.Continue)


def _expressions(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a statement that a fault may change: no annotations, no pieces of text."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            idle = isinstance(child, ast.JoinedStr) or (isinstance(child, ast.keyword) and child.arg in IDLE_ARGUMENTS)
            if isinstance(child, ast.AST) and not idle:
                yield child
                yield from _expressions(child)


def _changes(node: ast.AST, default: bool) -> Iterator[tuple[str, object]]:
    """The faults of one expression: (kind, function that makes the change on a copy)."""

    def setting(**fields):
        return lambda other: [setattr(other, name, value) for name, value in fields.items()]

    match node:
        case ast.BinOp(left=left, right=right) if type(node.op) in BINARY and not (_is_text(left) or _is_text(right)):
            yield "operator", setting(op=BINARY[type(node.op)]())
        case ast.Compare(ops=[op]):
            yield "operator", setting(ops=[COMPARED[type(op)]()])
        case ast.AugAssign() if type(node.op) in BINARY:
            yield "operator", setting(op=BINARY[type(node.op)]())
        case ast.BoolOp(op=op):
            yield "and/or", setting(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "negated", setting(operand=ast.UnaryOp(op=ast.Not(), operand=operand))
        case ast.Constant(value=bool(value)):
            yield ("default" if default else "negated"), setting(value=not value)
        case ast.Constant(value=int(value)):
            yield ("default" if default else "constant"), setting(value=value + 1 if value != 1 else 2)
        case ast.Constant(value=float(value)):
            yield ("default" if default else "constant"), setting(value=value * 2 if value else 1.0)
        case ast.Call(func=function, args=[*_, _, _] as args) if (
            not any(isinstance(a, ast.Starred) for a in args)
            and getattr(function, "attr", getattr(function, "id", "")) not in SYMMETRIC
        ):
            for first in range(len(args) - 1):
                order = [*args[:first], args[first + 1], args[first], *args[first + 2 :]]
                yield "swapped", lambda other, order=order: setattr(other, "args", copy.deepcopy(order))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
