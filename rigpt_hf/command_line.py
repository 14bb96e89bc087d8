"""How every program of the project runs at the terminal: one style, and errors that end in one line."""

import difflib
import functools
import inspect
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from .extras import advice
from .help import App
from .status import status
from .stops import leave_to_program
from .terminal import Console, Output, answering, safe_output, silenced, visible


# Typer has a copy of Click of its own or uses Click's, depending on its version: the class is the parent of this one.
UsageError: Any = typer.BadParameter.__mro__[1]
# Where Python says `force=True` or `target='llama'`, a person at the terminal says `--force` or `--to llama`.
SPELLINGS = {"force": "--force", "dropout": "--dropout", "qk_gain": "--qk-gain", "target": "--to", "frame": "--frame"}
# Names that functions have for what is an option of another name.
INNER = {"output_dir": "output", "target": "to", "model": "a", "reference": "b", "repo_id": "repo"} | {
    "validation": "eval_share",
    "context": "context_length",
    "folder": "data_dir",
    "batch_size": "global_batch_size",
    "batches": "eval_batches",
    "text_column": "data_options",
    "separator": "data_options",
}
# What a message of the library calls an argument that no program has.
UNTYPED = {"`token` must": "The token of `hf auth login` or `HF_TOKEN` must"}
# What a message says after this is about a file.
OF_FILE = "`config.json` with possible values"
# Seconds that a process of several waits before it says why it failed: a launcher ends it when the main one has.
PATIENCE = 10.0
# Tokens of people, of applications that act for them (which are JSON Web Tokens), and of organizations.
ACCESS_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[\w.-]{30,}|api_org_[A-Za-z0-9]{30,})"
)
# Marks in the annotation of a parameter: a path that is read, one that is written or replaced, and one that is written
# unless it is `STDOUT`, where standard output takes it and nothing else.
READS, WRITES, ANSWERS = "reads", "writes", "answers"
STDOUT = Path("-")


# What launchers tell the processes that they start.
NUMBER = r"-?\d{1,9}"
LAUNCHED = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"), NUMBER) | {
    "ACCELERATE_MIXED_PRECISION": "no|fp16|bf16|fp8"
}


# The words that a person typed behind the name of the program, see [`typed_again`].
_typed: ContextVar[tuple[str, ...]] = ContextVar("_typed", default=())


class Terminated(BaseException):
    """SIGTERM, so that whatever is being written is taken away on the way out."""


def make_app(**options: Any) -> typer.Typer:
    """A Typer application in the style of the project: `-h` beside `--help`, Markdown, errors without boxes."""
    settings = {"help_option_names": ["-h", "--help"]}
    return App(rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=settings, **options)


def execute(app: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """
    Run an application; bad input and failures end in one line on standard error.

    Args:
        app: What to run.
        name: How a person calls it, for the usage line and for errors.
        arguments: Those of the process if not given. Options may be spelled with `_` instead of `-`; with `--debug`
            anywhere among them, failures that are not bad usage are raised.

    Returns:
        The exit code: 2 for bad input and failures, 130 and 143 after signals.
    """
    leave_to_program()
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    words = hyphenated([argument for argument in arguments if argument != "--debug"])
    _typed.set(tuple(words))
    try:
        check_environment()
        # Outside of its standalone mode Typer raises what it would otherwise draw in a box, and returns exit codes.
        with terminable(), safe_output() as output:
            code = app(words, prog_name=name, standalone_mode=False)
        if code == 130:  # Typer's word for a stop from the keyboard
            raise KeyboardInterrupt
        if output.failure is not None and not code:
            return fail(
                name,
                f"standard output must take what is said, got {output.failure.strerror}. All else is done and whole.",
            )
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return fail(name, usage_message(error, name))
    except (typer.Abort, KeyboardInterrupt):
        return fail(name, "stopped from the keyboard.", 130)
    except Terminated:
        return fail(name, "stopped by SIGTERM.", 143)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ImportError) and (missing := advice(error)):
            return fail(name, missing)
        message = as_options(str(error))
        if isinstance(error, OSError) and not isinstance(error, ValueError) and error.filename is not None:
            # What no check has foreseen: a name too long, a place that nobody may enter.
            named = str(error.filename)[:80]
            message = f"A path must be one that can be read or written, got {named!r}: {error.strerror}. Name another."
        if not isinstance(error, (ValueError, OSError)):
            message = f"{type(error).__name__}: {message}. To see where it comes from, say {name} --debug ..."
        return fail(name, message)


def typed_again(verb: str, without: str = "") -> list[str]:
    """The command that runs, by its words, less one of them; nothing where nobody typed one."""
    words = [ACCESS_TOKEN.sub("[token]", word) for word in _typed.get() if word != without]
    return ["rigpt", *([] if words[:1] == [verb] else [verb]), *words] if words else []


def check_environment() -> None:
    """A `ValueError` if what launchers say in the environment is nothing that a launcher says."""
    for name, known in LAUNCHED.items():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(known, value):
            rule = "a whole number" if known == NUMBER else f"one of {known.replace('|', ', ')}"
            raise ValueError(
                f"`{name}` in the environment must be {rule}, got {value[:80]!r}. Unset it, or use a launcher."
            )


@contextmanager
def terminable() -> Iterator[None]:
    """Raises [`Terminated`] on SIGTERM, where nobody else has a use for that signal."""

    def stop(*_: object) -> None:
        raise Terminated

    try:
        ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if ours:
            signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may ask for signals
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    A function for `typer.Typer.command` that writes to nothing it reads, whose errors say what a person typed, and
    that has an option `--quiet`.

    Paths are known by the marks `READS`, `WRITES` and `ANSWERS` in annotations. A function among the marks is a check
    that needs no heavy import: it is called with the value, what a person calls it, and all values, before the
    function itself.

    Raises:
        ValueError: if a path to write to is one to read from, lies in one, or holds one; or if two are the same; or as
            a check says.
    """
    typed: dict[str, str] = {}
    marked: dict[str, str] = {}
    checks: list[tuple[str, Callable[..., None]]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        for mark in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(mark, str):
                marked[name] = mark
            elif isinstance(mark, typer.models.ArgumentInfo):
                typed[name] = name.upper()
            elif isinstance(mark, typer.models.OptionInfo):
                # Beside a type, Typer keeps the first spelling in the place of the default.
                spelled = mark.default if isinstance(mark.default, str) else f"--{name.replace('_', '-')}"
                typed[name] = typed[spelled.strip("-").replace("-", "_")] = spelled.partition("/")[0]
            elif callable(mark):
                checks.append((name, mark))

    signature = inspect.signature(function)
    adds_quiet = "quiet" not in signature.parameters

    @functools.wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        quiet = values.pop("quiet", False) if adds_quiet else values.get("quiet")
        answers = any(mark == ANSWERS and values.get(name) == STDOUT for name, mark in marked.items())
        writes = (WRITES,) if answers else (WRITES, ANSWERS)
        read, written = ([name for name, mark in marked.items() if mark in kinds] for kinds in ((READS,), writes))
        named = {typed.get(name, name): value for name, value in values.items()}
        check_text(named)
        check_seed(named)
        check_ends({typed[name]: values.get(name) for name in read})
        check_apart(*({typed[name]: values.get(name) for name in names} for names in (read, written)))
        try:
            for name, check in checks:
                check(values.get(name), typed[name], values)
            is_for_programs = answers or values.get("json") is True
            said = silenced() if quiet else nullcontext() if is_for_programs else status()
            with said, answering() if answers else nullcontext():
                return function(*args, **values)
        except ValueError as error:
            error.args = (as_typed(str(error), typed, values), *error.args[1:])
            raise

    if adds_quiet:
        kind = Annotated[bool, typer.Option("--quiet", help="Say nothing but what is wrong.", show_default="no")]
        parameter = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        call.__annotations__ = function.__annotations__ | {"quiet": kind}
        vars(call)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), parameter])
    return call


def check_text(named: Mapping[str, Any]) -> None:
    """A `ValueError` if a word is not text in UTF-8, which libraries could not pass on or write down."""
    for name, value in named.items():
        for one in listed(value):
            try:
                str(one).encode() if isinstance(one, (str, Path)) else None
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"`{name}` must be text in UTF-8, got {str(one)[:80]!r}. Use another name."
                ) from error


def check_ends(named: Mapping[str, Any]) -> None:
    """A `ValueError` if what is read is neither a file nor a folder: what comes out of a pipe may never end."""
    for name, value in named.items():
        for one in listed(value):
            if one is not None and is_endless(one):
                raise ValueError(
                    f"`{name}` must be a file or a folder, got {str(one)[:80]!r}, which is a pipe or a device. Write "
                    "what it gives to a file, and name that."
                )


def is_endless(path: str | os.PathLike) -> bool:
    """Whether something is at a path that is neither a file nor a folder; links are followed."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing is there, which whoever reads it says
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_seed(named: Mapping[str, Any]) -> None:
    """A `ValueError` if a seed is none that every generator of random numbers takes."""
    for name, value in named.items():
        if name.endswith("seed") and isinstance(value, int) and not 0 <= value < 2**32:
            raise ValueError(f"`{name}` must be from 0 to {2**32 - 1}, got {str(value)[:80]}. Take another.")


def check_apart(read: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """
    Raise if writing would touch what is read, or one output another.

    Args:
        read, written: Paths, lists of paths, ids on the Hub or `None`, by what a person calls them.

    Raises:
        ValueError: names both, the rule and the path; also if a path cannot be followed.
    """

    def places(named: Mapping[str, Any]) -> Iterator[tuple[str, Path, bool]]:
        every = [(name, one) for name, value in named.items() for one in listed(value)]
        for name, one in every:
            try:
                if one is not None:
                    yield name, Path(one).resolve(), Path(one).exists()
            except (OSError, RuntimeError) as error:  # a name too long, a link that leads to itself
                reason = getattr(error, "strerror", None) or "its links lead in a circle"
                raise ValueError(
                    f"`{name}` must be a path that can be followed, got {str(one)[:80]!r}: {reason}. Name another."
                ) from error

    inputs = [(name, path) for name, path, exists in places(read) if exists]
    outputs = [(name, path) for name, path, _ in places(written)]
    for index, (name, path) in enumerate(outputs):
        check_above(path, name)
        for other, source in inputs:
            # A new file in a folder that is read harms nothing.
            if path == source or path in source.parents or (source in path.parents and path.is_file()):
                raise ValueError(
                    f"`{name}` must not replace what is read, got {str(path)!r} and `{other}` {str(source)!r}. Name "
                    "another place."
                )
        for other, earlier in outputs[:index]:
            if path == earlier or path in earlier.parents or earlier in path.parents:
                raise ValueError(
                    f"`{name}` and `{other}` are both written and must not lie in each other, got {str(path)!r} and "
                    f"{str(earlier)!r}. Name another place."
                )


def check_above(path: Path, argument: str, *, is_folder: bool = False) -> None:
    """A `ValueError` if nothing, or no folder, can be at a path: a link to nothing or a file is there or above it."""
    above = next(at for at in (*[path] * is_folder, path.parent, *path.parents) if at.exists() or at.is_symlink())
    if not above.is_dir():
        rule = "a folder, or a new name in one" if is_folder else "a name in a folder"
        raise ValueError(f"`{argument}` must be {rule}, got {str(path)!r}: {str(above)!r} is none. Name another.")


def as_typed(message: str, typed: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """
    A message with the names of arguments as a person types them.

    Args:
        message: Has names of arguments in backticks.
        typed: How each parameter of the program is spelled.
        values: Of the parameters: where a function that serves several says `source`, `model` or `repo`, the one is
            meant whose value the message shows.
    """

    def shown(before: str) -> list[str]:
        texts = {name: listed(value) for name, value in values.items() if isinstance(value, (str, Path, list))}
        # The value itself, or a file in the folder that it names.
        starts = {name: [f"{before}{str(text)!r}"[:-1] for text in texts if text] for name, texts in texts.items()}
        return [name for name, own in starts.items() if any(f"{one}{end}" in message for one in own for end in "'\"/")]

    inner = dict(INNER)
    if "sources" in typed:
        inner |= dict.fromkeys(("models", "model", "reference", "a", "b"), "sources")
    elif "source" in typed:
        inner |= {"model": "source"}
    meant = shown("got ") or shown("")
    if len({str(values[name]) for name in meant}) == 1:  # of two that are the same the first is read first
        inner |= dict.fromkeys(("source", "model", "repo"), meant[0])
    # Names that the program itself has are those of the program.
    inner = {name: parameter for name, parameter in inner.items() if name not in typed or len(meant) == 1}

    def spell(match: re.Match) -> str:
        return f"`{typed.get(inner.get(match[1], match[1])) or typed.get(match[1], match[1])}`"

    for name, said in UNTYPED.items():
        message = message.replace(name, said)
    # What is said of the values in a file calls them as the file does; and two names may be those of one list.
    before, of_file, after = message.partition(OF_FILE)
    return re.sub(r"(`[^`]+`) and \1", r"all of \1", re.sub(r"`(\w+)`", spell, before)) + of_file + after


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as the only item of one."""
    return value if isinstance(value, list) else [value]


def fail(name: str, message: str, code: int = 2) -> int:
    """Write one line to standard error, and return the exit code; of several processes the main one does."""
    if os.environ.get("RANK", "0") != "0":
        if code != 2:
            return code
        time.sleep(PATIENCE)
    if reply := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what `torchrun` shows below its own traceback
        with suppress(OSError):
            Path(reply).write_text(json.dumps({"message": f"{name}: {message}", "timestamp": int(time.time())}))
    from rich.text import Text

    # A token may have been typed in the place of something else.
    message = visible(ACCESS_TOKEN.sub("[token]", message))
    # Not as markup: a message may hold anything in square brackets.
    sys.stderr = errors = Output(sys.stderr)  # where it takes nothing, the exit code says enough
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{name}: ", "red"), message))
    sys.stderr = errors.stream
    return code


def usage_message(error: Any, name: str) -> str:
    """The fault of a command line, in one line, and where its help is."""
    path = error.ctx.command_path if error.ctx else name
    if (typed := getattr(error, "option_name", None)) and error.ctx and hasattr(error, "possibilities"):
        error.possibilities = like_option(typed, error.ctx.command)
    message = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    if typed and (lacking := re.search(r"requires (an argument|\d+ arguments)$", message)):
        count = "a value" if lacking[1] == "an argument" else lacking[1].replace("arguments", "values")
        message = f"`{typed}` must have {count} behind it, got none"
    # What was typed is repeated by the library as a whole.
    message = re.sub(r"'[^']{81,}'|\S{81,}", lambda match: f"{match[0][:77]}...", message)
    return f"{message}{'' if message.endswith('?') else '.'} See {path} --help"


def like_option(typed: str, command: Any) -> list[str]:
    """The options that a person may have meant: by a part of a name (`--epochs`), initials (`--lr`), or a slip."""
    known = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    word = typed.lstrip("-")
    near = [name for name in known if word in name or word == "".join(part[0] for part in name[2:].split("-"))]
    return near or difflib.get_close_matches(typed, known, cutoff=0.7)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names, with a space before it; nothing if none is near."""
    near = difflib.get_close_matches(name, [*known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


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
