"""Files of text on this machine, for all programs that read any: which of them a path means, and the rows in them."""

import gzip
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.written import parse_json


T = TypeVar("T")
Row = dict[str, Any]
# Readers of files by the end of the name in any case; behind all but the last it may be .gz.
READERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
# Ends of names that are text where a person names the file itself; in a folder of data they tell about it.
PLAIN = ("", ".text", ".md", ".rst", ".tex", ".log", ".py")
# Between the stories of TinyStories and in other dumps; no text of its own contains it.
SEPARATOR = "<|endoftext|>"
CHUNK = 2**20  # characters read at a time
FOREIGN_ROWS = 1000  # rows without the column after which a file has none
# Parts of a path that name a split, as `datasets` reads them.
SPLIT = re.compile(
    r"(?:^|[-._ 0-9/])(?:(train(?:ing)?)|(validation|valid|val|dev)|(test(?:ing)?|eval(?:uation)?))(?=[-._ 0-9/]|$)"
)
SPLITS = ("train", "validation", "test")

logger = logging.getLogger(__name__)


class Unreadable(ValueError):
    """A file that is refused, in words that say already what to do."""


def reader_of(name: str | os.PathLike) -> str | None:
    """The reader of a file of this name: text, json or parquet; None if nothing does."""
    name = os.fspath(name).lower()
    end = os.path.splitext(name.removesuffix(".gz"))[1]
    reader = READERS.get(end)
    return None if reader == "parquet" and name.endswith(".gz") else reader


def is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` made this folder."""
    return all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def split_files(source: str | os.PathLike, argument: str = "source") -> dict[str, list[Path]]:
    """
    The files of each split, sorted by name, hidden ones in a folder left out; a saved data set counts as a file.

    Splits of a folder are told by names such as `train-0.jsonl` or `test/a.txt`; where no name tells, all is `train`.

    Args:
        source (`str` or `os.PathLike`): A file, a folder, or what `save_to_disk` of `datasets` made.
        argument (`str`, defaults to `"source"`): What error messages call it.

    Raises:
        ValueError: if it does not exist, or there is no file of a known kind.
    """
    path = _there(source, argument)
    if (path / "dataset_dict.json").is_file():
        return {folder.name: [folder] for folder in sorted(path.iterdir()) if is_saved(folder)}
    if not path.is_dir() or is_saved(path):
        return {"train": source_files(path, argument)}
    splits: dict[str, list[Path]] = {}
    for file in (files := source_files(path, argument)):
        place = file.relative_to(path)
        # A name counts more than the folders above it.
        if match := SPLIT.search(place.name) or SPLIT.search(place.parent.as_posix()):
            splits.setdefault(SPLITS[(match.lastindex or 1) - 1], []).append(file)
    return splits or {"train": files}


def source_files(source: str | os.PathLike, argument: str = "source", split: str = "train") -> list[Path]:
    """
    The files of a local source, all splits together but those of a saved data set; arguments as of [`split_files`].

    Raises:
        ValueError: as [`split_files`].
    """
    path = _there(source, argument)
    if (path / "dataset_dict.json").is_file():
        files = split_files(path).get(split, [])
    elif is_saved(path):
        files = [path]
    elif path.is_dir():
        inside = [entry for entry in path.rglob("*") if entry.is_file() and reader_of(entry)]
        files = sorted(entry for entry in inside if not any(p.startswith(".") for p in entry.relative_to(path).parts))
    else:
        known = reader_of(path) or os.path.splitext(path.name.lower())[1] in PLAIN
        files = [path] if path.is_file() and known else []
    if not files:
        raise Unreadable(
            f"`{argument}` must be or hold files that end in {', '.join(READERS)}, or a saved data set with the split "
            f"{split!r}, got {str(source)!r}. Rename or convert what is there."
        )
    return files


def _there(source: str | os.PathLike, argument: str) -> Path:
    path = Path(source)
    try:
        path.stat()
    except OSError as error:  # also a name too long
        raise Unreadable(
            f"`{argument}` must be a file or a folder, got {str(source)[:200]!r}: {error.strerror}. Check the path."
        ) from error
    return path


def local_documents(
    source: str | os.PathLike,
    text_column: str = "text",
    separator: str = SEPARATOR,
    argument: str = "source",
    split: str = "train",
) -> Iterator[str]:
    """
    The documents of a file or folder, none blank; arguments as of `documents`, and what messages call the source.

    Raises:
        ValueError: as `documents`.
    """

    def missing(path: Path, columns: list[str]) -> ValueError:
        return no_column(text_column, str(path), columns, argument)

    def read(path: Path) -> Iterator[str]:
        if path.is_file() and reader_of(path) in ("text", None):
            texts: Iterator[Any] = _separated(path, separator, argument)
        else:
            texts = (row.get(text_column) for row in rows(path, [text_column], missing, argument))
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise no_text(text, text_column, str(path), argument)
            if text and not text.isspace():
                yield text

    return each(source_files(source, argument, split), read)


def _separated(path: Path, separator: str, argument: str) -> Iterator[str]:
    try:
        with open_text(path) as file:
            pending, seen = "", False
            # Reading as much again as is pending keeps a file without a separator from taking quadratic time.
            while chunk := file.read(max(CHUNK, len(pending))):
                *complete, pending = (pending + chunk).split(separator)
                seen = seen or bool(complete)
                yield from (text.strip() for text in complete)
            yield pending.strip() if seen else pending
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise unreadable(path, error, argument) from error


def each(files: Sequence[Path], read: Callable[[Path], Iterator[T]]) -> Iterator[T]:
    """All that is read from files; one of several that gives nothing is skipped, and named once."""
    for path in files:
        empty = True
        for item in read(path):
            empty = False
            yield item
        if empty and len(files) > 1:
            _say_empty(path)


@cache
def _say_empty(path: Path) -> None:
    logger.warning(f"{str(path)!r} holds no text; it is skipped.")


def rows(
    path: Path, columns: Sequence[str], missing: Callable[[Path, list[str]], ValueError], argument: str = "source"
) -> Iterator[Row]:
    """
    The rows of a file or of a saved data set; nothing but `columns` is looked at. A text file is one row, of `text`.

    Args:
        path (`Path`): One of [`source_files`].
        columns (`Sequence[str]`): Those that are wanted.
        missing: The error where there is none of them, from the path and the columns that there are.
        argument (`str`, defaults to `"source"`): What error messages call the source.

    Raises:
        ValueError: if it cannot be read; the message names the file, and the line where there are any.
    """
    reader = "saved" if path.is_dir() else reader_of(path) or "text"
    try:
        if reader == "text":
            text = read_text(path, argument)
            if text and not text.isspace():
                yield {"text": text}
        elif reader == "json":
            yield from _with_columns(_json_rows(path), path, columns, missing)
        elif path.is_dir() or path.stat().st_size:
            yield from _with_columns(_arrow_rows(path, columns), path, columns, missing)
    except Unreadable:
        raise
    except Exception as error:  # of files and of libraries that read them, which have classes of their own
        raise unreadable(path, error, argument) from error


def read_text(path: Path, argument: str = "source") -> str:
    """A text file as a whole, without a byte-order mark; a `ValueError` if it is not one, or not UTF-8."""
    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise unreadable(path, error, argument) from error


def open_text(path: Path) -> Any:
    """A file of UTF-8, compressed or not, behind its byte-order mark if it has one."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig")


def unreadable(path: Path, error: Exception, argument: str) -> Unreadable:
    """The refusal of a file, for the reason that the system or a library gives."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        reason = f"it is not UTF-8 at byte {error.start}"
    return Unreadable(
        f"`{argument}` must hold files of UTF-8 text, JSON or Parquet that can be read, got {str(path)!r}: "
        f"{reason.rstrip('.')}. Mend it, or leave it out."
    )


def no_column(text_column: str, source: str, columns: list[str], argument: str = "source") -> Unreadable:
    """The refusal of a source without the column of texts."""
    return Unreadable(
        f"`{argument}` must have its texts in the column {text_column!r}, got {source!r} with "
        f"{', '.join(columns)[:200]}. Rename the column that holds them{_or_name(argument)}."
    )


def no_text(text: Any, text_column: str, source: str, argument: str = "source") -> Unreadable:
    """The refusal of a column of something else than text."""
    return Unreadable(
        f"`{argument}` must have text in the column {text_column!r}, got {type(text).__name__} in {source!r}. Rename "
        f"the column that holds text{_or_name(argument)}."
    )


def _or_name(argument: str) -> str:
    # Only the function that calls it a source has an option for the column.
    return ", or name it as `text_column`" if argument == "source" else ""


def _json_rows(path: Path) -> Iterator[Any]:
    """Objects or texts, one or a list of them a line; or those that the whole file is."""
    with open_text(path) as file:
        begun = False
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                if begun:
                    raise ValueError(f"line {number} is not JSON: {getattr(error, 'msg', error)}") from error
                line += file.read()
                value = parse_json(line)
                if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
                    value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
            begun = True
            _check_surrogates(line, value, number)
            for item in value if isinstance(value, list) else [value]:
                yield {"text": item} if isinstance(item, str) else item


def _check_surrogates(text: str, value: Any, number: int) -> None:
    """A `ValueError` if a value, which `text` from this line on says, has half of a pair: no tokenizer takes it."""
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"from line {number} on a text has half of a surrogate pair") from error


def _arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    if path.is_dir():
        import datasets

        table = datasets.load_from_disk(str(path))
        wanted = [name for name in columns if name in table.column_names]
        yield from table.select_columns(wanted) if wanted else [dict.fromkeys(table.column_names)][: len(table)]
        return
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = [name for name in columns if name in names]
        if not wanted:
            yield from [dict.fromkeys(names)][: file.metadata.num_rows]
            return
        for batch in file.iter_batches(columns=wanted):
            yield from batch.to_pylist()


def _with_columns(
    given: Iterator[Row], path: Path, columns: Sequence[str], missing: Callable[[Path, list[str]], ValueError]
) -> Iterator[Row]:
    """The same rows, unless none of the first has any of the columns."""
    names: dict[str, None] = {}
    present = False
    for number, row in enumerate(given):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} must be an object, got {str(row)[:80]!r}")
        if not present:
            names |= dict.fromkeys(row)
            present = any(name in row for name in columns)
            if not present and number == FOREIGN_ROWS:
                break
        yield row
    if names and not present:
        raise Unreadable(str(missing(path, list(names))))
