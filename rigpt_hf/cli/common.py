"""Helpers of verbs: checks before any weights are read, files that appear complete, the report in the end."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..checkpoints.disk import folders_above
from ..checkpoints.folder import amend_record, check_file
from ..checkpoints.folder import new_file as whole_file
from ..command_line import STDOUT
from ..extras import require
from ..terminal import Console, answer, say_next


def to_dtype(name: str | None) -> Any:
    """The torch dtype of this name."""
    import torch

    return None if name is None else getattr(torch, name)


def is_rigpt_too(stored: Any) -> bool:
    """Whether a [`Stored`] can be opened as a RiGPT."""
    from ..checkpoints.opened import opened

    try:
        return bool(opened(stored))
    except ValueError:
        return False


def writes(stored: Any) -> bool:
    """Whether `rigpt generate` takes a [`Stored`]: a folder or an id, with a tokenizer."""
    try:
        return not stored.is_whole and not Path(stored.name).is_file() and bool(stored.tokenizer())
    except ValueError:
        return False


def check_device(device: str | None, dtype: str | None = None):
    """
    Raise a `ValueError` if PyTorch cannot put anything on this device, or only shapes without numbers, or has no such
    numbers there; `None`: the caller has none in mind.
    """
    import torch

    try:
        if torch.empty(0, device=device, dtype=to_dtype(dtype)).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, TypeError) as error:  # the last of MPS, which has no float64
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`device` must be one that PyTorch can use here, such as cpu, got {device!r}: {reason}"
        ) from error


@contextmanager
def new_file(path: Path, argument: str, seen: list[int] | None) -> Iterator[Path]:
    """
    A place beside `path` to write a file to; it becomes `path` when the block ends well, and is removed if not.

    Args:
        path: Where the file shall appear.
        argument: Name of the argument that says so.
        seen: What [`check_file`] gave of it.

    Raises:
        ValueError: if it cannot be written, or something else is there now.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(folders_above(path))
            temporary = stack.enter_context(whole_file(path, argument, seen, named=True))
            temporary.touch()
        except OSError as error:
            raise ValueError(
                f"`{argument}` must be a place that can be written to, got {str(path)!r}: {error.strerror}. Name "
                "another."
            ) from error
        yield temporary


@contextmanager
def new_files() -> Iterator[Callable[[Path, str, list[int] | None], Path]]:
    """[`new_file`] for several: if one of them cannot appear, those that took nobody's place go again."""
    appeared: list[tuple[Path, int]] = []
    try:
        with ExitStack() as stack:

            def begin(path: Path, argument: str, seen: list[int] | None) -> Path:
                temporary = stack.enter_context(new_file(path, argument, seen))
                if seen is None:  # a file keeps its number when it gets its name
                    stack.callback(lambda: appeared.append((path, temporary.stat().st_ino)))
                return temporary

            yield begin
    except BaseException:
        for path, number in appeared:
            with suppress(OSError):
                if path.lstat().st_ino == number:
                    path.unlink()
                    amend_record(path, None)
        raise


def check_picture(path: Path | None, force: bool, argument: str = "picture") -> list[int] | None:
    """[`check_file`] of a picture; a `ValueError` also if its name ends in no format, or none can be drawn."""
    seen = check_file(path, argument, force)
    if path is not None:
        from ..pictures.style import check_format

        check_format(path, argument)
        require("pictures")
    return seen


def save_picture(
    path: Path | None,
    seen: list[int] | None,
    draw: Callable[[], Any],
    begin: Any = None,
    argument: str = "picture",
):
    """
    Draw a picture and write it to a file, if there is a name for one.

    Args:
        path: The file.
        seen: What [`check_picture`] gave of it.
        draw: Makes the figure.
        begin: Of [`new_files`], if it is one of them.
        argument: Name of the argument that says so.
    """
    if path is not None:
        from ..pictures.style import encoded

        with nullcontext(begin(path, argument, seen)) if begin else new_file(path, argument, seen) as place:
            place.write_bytes(encoded(draw(), path.suffix[1:]))
        Console().print(f"Picture in {path}", markup=False)


def save_model(model: Any, source: Any, output: Path, seen: Any, facts: dict[str, dict], representation: Any = None):
    """
    Write a model with the tokenizer and the generation config of the [`Stored`] `source`, some JSON files and the
    record of a token symmetry, if it has one; the folder appears complete or not at all.

    `seen` is what `check_output` gave of `output`.
    """
    from ..checkpoints.companions import check_companions, save_generation_config, save_tokenizer
    from ..checkpoints.folder import new_folder
    from ..checkpoints.read import quiet_loading

    check_companions(source.folder)
    with new_folder(output, seen) as folder:
        with quiet_loading():
            model.save_pretrained(folder)
        if representation is not None:
            representation.save(folder)
        save_generation_config(source.folder, folder, model.config)
        save_tokenizer(source.folder, folder, **source.tokenizer_options)
        save_facts(facts, folder)


def save_facts(facts: dict[str, dict], folder: Path) -> None:
    """JSON files in a folder, by name."""
    for name, values in facts.items():
        (folder / name).write_text(as_json(values), encoding="utf-8")


def as_json(facts: Any) -> str:
    """Facts as a person reads them, too; what JSON has no word for, such as NaN, is null."""
    return json.dumps(json.loads(json.dumps(facts), parse_constant=lambda _: None), indent=2) + "\n"


def check_json(path: Path | None, force: bool) -> list[int] | None:
    """[`check_file`] of a file of JSON; standard output may always be written to."""
    return None if path == STDOUT else check_file(path, "json", force)


def save_json(facts: Any, path: Path | None, seen: list[int] | None, begin: Any = None):
    """
    Write facts to a file, or to standard output, if one of them is asked for.

    Args:
        facts: What JSON can hold.
        path: The file.
        seen: What [`check_json`] gave of it.
        begin: Of [`new_files`], if it is one of them.
    """
    if path == STDOUT:
        answer(as_json(facts))
    elif path is not None:
        with nullcontext(begin(path, "json", seen)) if begin else new_file(path, "json", seen) as place:
            place.write_text(as_json(facts), encoding="utf-8")


def say(notes: Iterable[str]) -> None:
    """Remarks on models that must stand beside the results."""
    console = Console()
    for note in notes:
        # On a terminal words stay whole; elsewhere each stays in one line.
        console.print(note, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def report(certificate: Any, output: Path, *commands: Iterable[object]):
    """Print the certificate of what was written, where it is, and commands for what may be wanted next."""
    Console().print(str(certificate), highlight=False, markup=False)
    say_written(output, *commands)


def as_given(**options: Any) -> list[str]:
    """The words of options that have a value."""
    given = {name: value for name, value in options.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def say_written(output: Path, *commands: Iterable[object], size: str = ""):
    """Say what was written, and commands for what may be wanted next."""
    Console().print(f"Written to {output}{size}", markup=False)
    say_next(*commands)
