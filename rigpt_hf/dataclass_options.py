'''
The command line of a program, made from a dataclass: its fields are the options, the docstring under each the help.

    @dataclass
    class Options:
        model: str
        """Folder or Hub id."""             # without a default: a positional argument, MODEL; a list: several
        save_steps: int = 500
        """Steps between checkpoints."""    # --save-steps; Annotated[int, {"argument": True}] makes it positional

    main = program(Options, train, name="train")
    main(["gpt2", "--save-steps", "100"])   # calls train(Options("gpt2", 100)) and returns the exit code

A field that is a dataclass itself is a group: `run: RunOptions` has options such as `--run.save-steps`, and the
section `run` in YAML. A field of type `X | None` takes `null` too, a list its items with commas, a dict `key=value`
with commas; lists and dicts may also be YAML. A path is marked `READS` or `WRITES`, as in `Annotated[Path, WRITES]`.
`--config` names a YAML file, or a preset; what the command line gives wins, in a dict key by key, but for `{}`,
which empties it.
Imports nothing heavy, so that `--help` answers at once.
'''

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from .command_line import (
    READS,
    WRITES,
    UsageError,
    check_ends,
    did_you_mean,
    execute,
    guarded,
    hyphenated,
    make_app,
    usage_message,
)


T = TypeVar("T")
# A float as people write it; PyYAML takes 1e-3 for text.
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")


class Leaf(NamedTuple):
    """An option: a field of a dataclass or of one in it; its type and help."""

    field: Field
    annotation: Any
    help: str


def program(
    options: type[T], run: Callable[[T], Any], *, name: str, help: str | None = None, presets: Path | None = None
) -> Callable[..., int]:
    """
    A program whose options are the fields of a dataclass.

    Args:
        options: The dataclass. It may raise `ValueError` for what it refuses.
        run: What is done with it; may raise `ValueError` or `OSError`. An `int` that it returns is the exit code.
        name: How a person calls the program, for the usage line and for errors.
        help: What it does, in Markdown; the docstring of `run` if not given.
        presets: Folder of YAML files that `--config` finds by their names.

    Returns:
        A function of the arguments (those of the process if not given) that returns the exit code, 2 for bad input.
    """
    app = make_app(add_completion=False)
    app.command(help=help)(command(options, run, presets=presets))
    return partial(execute, app, name)


def parse(options: type[T], arguments: list[str], *, name: str = "program", presets: Path | None = None) -> T:
    """
    The dataclass that a command line asks for.

    Raises:
        ValueError: if an option does not exist or does not fit.
        SystemExit: after `--help`.
    """
    app = make_app(add_completion=False)
    app.command()(command(options, lambda parsed: parsed, presets=presets))
    try:
        parsed = app(hyphenated(arguments), prog_name=name, standalone_mode=False)
    except UsageError as error:
        raise ValueError(usage_message(error, name)) from error
    if isinstance(parsed, int):
        sys.exit(parsed)
    return parsed


def command(options: type[T], run: Callable[[T], Any], *, presets: Path | None = None) -> Callable[..., Any]:
    """
    A function for `typer.Typer.command` whose parameters are the fields of a dataclass, and `--config`.

    Arguments are as in [`program`]; the docstring of `run` becomes the help.
    """
    declared = dict(leaves(options))

    def main(typer_context: typer.Context, config: list[str] | None, **values: Any) -> Any:
        filed = typer_context.default_map or {}
        for name, value in values.items():
            if isinstance(value, dict) and isinstance(filed.get(name), dict):
                values[name] = filed[name] | value if value else {}
        return run(build(options, values))

    def read(context: typer.Context, names: list[str] | None) -> list[str] | None:
        # Eager, so that every other option finds what the files say in the place of its default.
        context.default_map = {}
        for name in names or ():
            try:
                context.default_map |= read_config(find_preset(name, presets), declared, preset_names(presets))
            except ValueError as error:  # in the words of whoever types it
                said = str(error).replace("`config`", "`--config`", 1)
                raise ValueError(said.replace(" Try --help.", f" See {context.command_path} --help")) from error
        return names

    known = ", ".join(preset_names(presets))
    text = "YAML file with any of the options" + (f", or the name of a preset: {known}." if known else ".")
    config = typer.Option(help=text, is_eager=True, callback=read, metavar="FILE", show_default="none")
    parameters = [
        inspect.Parameter("typer_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(parameter(name, leaf) for name, leaf in declared.items()),
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[list[str] | None, config], default=None
        ),
    ]
    main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    main.__annotations__ = {item.name: item.annotation for item in parameters}
    main.__doc__, main.__name__ = run.__doc__, getattr(run, "__name__", "main")
    return guarded(main)


def leaves(options: type, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every option by name, groups opened: `run__steps` for the field `steps` of the field `run`."""
    docs, annotations = field_docs(options), get_type_hints(options, include_extras=True)
    for field in fields(options):
        annotation, name = annotations[field.name], f"{prefix}{field.name}"
        if isinstance(annotation, type) and is_dataclass(annotation):
            yield from leaves(annotation, f"{name}__")
        elif field.init:
            yield name, Leaf(field, annotation, docs.get(field.name, ""))


def field_docs(options: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those it inherits from, each in one line."""
    docs: dict[str, str] = {}
    for kind in filter(is_dataclass, reversed(options.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        body = definition.body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def build(options: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """The dataclass, and those in it, with the values of [`leaves`]."""
    annotations = get_type_hints(options)
    return options(
        **{
            field.name: build(annotations[field.name], values, f"{prefix}{field.name}__")
            if is_dataclass(annotations[field.name])
            else values[f"{prefix}{field.name}"]
            for field in fields(options)  # type: ignore[arg-type]
            if field.init
        }
    )


def parameter(name: str, leaf: Leaf) -> inspect.Parameter:
    """The parameter that Typer reads: type, default, and how the option or argument is spelled and explained."""
    annotation, given = leaf.annotation, {}
    marks: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        annotation, *rest = get_args(annotation)
        marks = tuple(mark for mark in rest if isinstance(mark, str) or callable(mark))
        given = {key: value for mark in rest if isinstance(mark, dict) for key, value in mark.items()}
    kind, optional = without_none(annotation)
    if Path in (kind, *get_args(kind)) and not {READS, WRITES} & set(marks):
        raise TypeError(
            f"the path `{name}` must be marked READS or WRITES, so that nothing is written over what is read"
        )
    settings: dict[str, Any] = {"help": leaf.help} | given
    required = leaf.field.default is MISSING and leaf.field.default_factory is MISSING
    positional = settings.pop("argument", False) or required
    if optional or get_origin(kind) in (tuple, dict) or (get_origin(kind) is list and not positional):
        settings |= {"parser": Parser(kind, optional), "metavar": metavar(kind)}
        kind = str
    if positional:
        default: Any = inspect.Parameter.empty if required else leaf.field.default
        declaration = typer.Argument(**settings)
    else:
        factory = leaf.field.default_factory
        default = leaf.field.default if factory is MISSING else factory()
        if isinstance(default, bool):
            settings.setdefault("show_default", "yes" if default else "no")
        elif not default and not isinstance(default, (int, float)):
            settings.setdefault("show_default", "none")
        elif isinstance(default, (list, tuple)):
            settings.setdefault("show_default", ",".join(map(str, default)))
        group, _, last = name.replace("_", "-").rpartition("--")
        group = f"{group.replace('--', '.')}." if group else ""
        negation = f"/--{group}no-{last}" if kind is bool else ""
        declaration = typer.Option(f"--{group}{last}{negation}", **settings)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, declaration, *marks], default=default
    )


def without_none(annotation: Any) -> tuple[Any, bool]:
    """A type without its `None`, and whether it had one."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        if len(kinds) != 1:
            raise TypeError(f"an option must have one type, and may be None besides; got {annotation}")
        return kinds[0], True
    return annotation, False


def metavar(kind: Any) -> str:
    """The name of a value of this type in the help."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {list: "A,B,...", tuple: "A,B,...", dict: "KEY=VALUE,..."}.get(get_origin(kind), f"<{kind.__name__}>")


class Parser:
    """Reads a list, a dict or a value that may be `null`, from the command line or out of a YAML file."""

    def __init__(self, kind: Any, optional: bool):
        self.kind, self.optional, self.__name__ = kind, optional, metavar(kind)

    def __call__(self, value: Any) -> Any:
        if self.optional and value in (None, "null", "none"):
            return None
        origin, kinds = get_origin(self.kind), get_args(self.kind)
        if origin in (list, tuple):
            if isinstance(value, str):
                value = read_yaml(value) if value.startswith("[") else [part.strip() for part in value.split(",")]
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{value!r:.80} is not a list. Separate several by commas.")
            return origin(convert(kinds[0], item) for item in value)
        if origin is dict:
            if isinstance(value, str) and not value.startswith("{"):
                value = f"{{{re.sub('=', ': ', value)}}}"
            value = read_yaml(value) if isinstance(value, str) else value
            if not isinstance(value, dict):
                raise ValueError(f"{value!r:.80} is not of the form key=value. Separate several by commas.")
            return {key: convert(kinds[1], item) for key, item in value.items()}
        return convert(self.kind, value)


def convert(kind: Any, value: Any) -> Any:
    """
    Convert a value to a type.

    Raises:
        ValueError: if it cannot be one of that type.
    """
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value!r:.80} is not one of {', '.join(map(repr, get_args(kind)))}.")
        return value
    try:
        # By way of text, so that 3.5 is no int.
        return kind(str(value))
    except ValueError as error:
        raise ValueError(f"{value!r:.80} is not a valid {kind.__name__}.") from error


def preset_names(presets: Path | None) -> list[str]:
    """The names of the presets in a folder, if there is one."""
    return sorted(path.stem for path in presets.glob("*.yaml")) if presets else []


def find_preset(name: str, presets: Path | None) -> Path:
    """
    The file that `--config` names: a path, or a preset as `smoke`, `smoke.yaml` or `presets/smoke.yaml`.

    A file of one's own comes first.
    """
    given = Path(name)
    if presets is not None and not given.is_file() and str(given.parent) in (".", "presets") and name[:1] != ".":
        packaged = presets / f"{given.name.removesuffix('.yaml')}.yaml"
        return packaged if packaged.is_file() else given
    return given


def read_config(path: Path, declared: dict[str, Leaf], presets: Sequence[str] = ()) -> dict[str, Any]:
    """
    The values in a YAML file by the names of [`leaves`].

    Raises:
        ValueError: if it cannot be read, which names the nearest of the presets, or has a key that is no option, which
            names the nearest option.
    """
    check_ends({"config": path})
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        kind = "a readable YAML file or a preset" if presets else "a readable YAML file"
        near = did_you_mean(path.name.removesuffix(".yaml"), presets)
        raise ValueError(f"`config` must be {kind}, got {str(path)!r}: {reason}.{near} Try --help.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`config` must have options as its keys, got {str(path)!r}, which has none. Try --help.")
    groups = {name.rpartition("__")[0] for name in declared}
    values: dict[str, Any] = {}

    def walk(section: dict[str, Any], prefix: str) -> None:
        for key, value in section.items():
            name = f"{prefix}{key}"
            if name in groups and isinstance(value, dict):
                walk(value, f"{name}__")
            elif name not in declared:
                options = [option.replace("__", ".") for option in declared]
                near = did_you_mean(name.replace("__", "."), options)
                raise ValueError(
                    f"`config` must have options as its keys, got `{name.replace('__', '.')}` in {str(path)!r}."
                    f"{near} Try --help."
                )
            elif value is None and not without_none(declared[name].annotation)[1]:
                raise ValueError(f"`{name.replace('__', '.')}` must have a value, got null in {str(path)!r}.")
            else:
                values[name] = "null" if value is None else value

    walk(content, "")
    return values


def read_yaml(text: str) -> Any:
    """
    The value of a YAML text.

    Raises:
        ValueError: if it is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{text[:80]!r} is not YAML: {yaml_fault(error)}") from error


def yaml_fault(error: BaseException) -> str:
    """The reason of an error of the library that reads YAML, in one short line."""
    if isinstance(error, RecursionError):
        return "its brackets are nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    if type(error) is ValueError:  # of Python itself, where text has the form of a number or a date
        return "a number or a date in it is impossible or too long"
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
