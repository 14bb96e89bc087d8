"""Where text comes from: installed documentation, local files, or a data set on the Hub."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub import HfApi

from ..extras import needs
from .corpus import gather_documentation
from .files import SEPARATOR, Unreadable, local_documents, no_column, no_text, reader_of


DOCUMENTATION = "docs"
# The answer of `datasets` to a data set that is a program, which it no longer runs.
SCRIPT = "Dataset scripts are no longer supported"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def documents(
    source: str | os.PathLike,
    *,
    text_column: str = "text",
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    separator: str = SEPARATOR,
    megabytes: float = 20.0,
) -> Iterator[str]:
    """
    The documents of a source, one text each, none blank, in the order of the source; streamed, never downloaded whole.

    Args:
        source (`str` or `os.PathLike`):
            `"docs"` for the documentation of the installed packages, but for the eighth of its paragraphs on which
            models are evaluated (`"./docs"` is a folder), a local file or folder (.txt, .jsonl, .json, .parquet, what
            `save_to_disk` made; folders are searched, in the order of the names), or the id of a data set on the Hub.
        text_column (`str`, defaults to `"text"`): Column that holds the text, of all but `"docs"` and .txt.
        split (`str`, defaults to `"train"`), name (`str`, *optional*), revision (`str`, *optional*):
            Which split, configuration and commit, branch or tag of a data set on the Hub; not looked at elsewhere,
            but for the split of a saved data set.
        separator (`str`, defaults to `"<|endoftext|>"`):
            Text between documents in a .txt file; a file without it is one document, held in memory as a whole.
            `"\\n\\n"` makes every paragraph a document.
        megabytes (`float`, defaults to 20): How much documentation `"docs"` gathers at most.

    Raises:
        ValueError: at once if the source does not exist or an option is impossible; while reading if a file or column
            cannot be read, or if there is no text at all.
    """
    source = os.fspath(source)
    kind = kind_of(source)
    if not separator:
        raise ValueError("`separator` must be some text, got ''. Leave it out for one document per file.")
    if kind == "documentation":
        if megabytes <= 0:
            raise ValueError(f"`megabytes` must be positive, got {megabytes}.")
        # The part on which `rigpt evaluate` measures is left out.
        texts = iter(gather_documentation(int(megabytes * 10**6), part="training"))
    elif kind == "local":
        texts = local_documents(source, text_column, separator, split=split)
    else:
        texts = _column(source, {"path": source, "name": name, "split": split, "revision": revision}, text_column)
    return _not_blank(texts, source)


def check_source_options(options: Mapping[str, Any]) -> None:
    """
    Raise if options, as a person wrote them, are not those of [`documents`].

    Raises:
        ValueError: that names the first one unknown or of another type.
    """
    known = {name: hint for name, hint in get_type_hints(documents).items() if name not in ("source", "return")}
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"`data_options` must be among {', '.join(known)}, got {name!r}. Correct its name, or leave it out."
            )
        hint = known[name]
        if not isinstance(value, (int, float) if hint is float else hint):
            wanted = "a number" if hint is float else "text"
            raise ValueError(
                f"`data_options` must have {wanted} as {name}, got {value!r}. Correct it, or leave it out."
            )


def kind_of(source: str) -> str:
    """
    `"documentation"`, `"local"` or `"hub"`.

    Raises:
        ValueError: if there is no such path and this cannot be the id of a data set.
    """
    if source == DOCUMENTATION:
        return "documentation"
    if Path(source).exists():
        return "local"
    if HUB_ID.fullmatch(source) and reader_of(source) is None:
        return "hub"
    raise ValueError(
        f"`source` must be 'docs', an existing file or folder, or the id of a data set on the Hub, got {source!r}. "
        "Check the path."
    )


def pinned(source: str, revision: str | None) -> str | None:
    """
    The commit that a revision of a data set on the Hub means now, so that what was read can be read again.

    Returns:
        `str`, or `None` for the other kinds of source.

    Raises:
        ValueError: if the Hub has no such data set or revision, or cannot be reached.
    """
    if kind_of(source) != "hub":
        return None
    try:
        return HfApi().dataset_info(source, revision=revision).sha
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def _column(source: str, options: dict[str, Any], text_column: str) -> Iterator[str]:
    """The texts in one column of a data set that `datasets` streams."""
    with needs("train"):
        from datasets import load_dataset

    try:
        rows = load_dataset(**options, streaming=True)
        if rows.column_names is not None:
            _check_column(rows.column_names, text_column, source)
            rows = rows.select_columns([text_column])
        for row in rows:
            _check_column(list(row), text_column, source)
            text = row[text_column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise no_text(text, text_column, source)
            yield text
    except Unreadable:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(source, error) from error


def _check_column(columns: list[str], text_column: str, source: str) -> None:
    if text_column not in columns:
        raise no_column(text_column, source, columns)


def _unreadable(source: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    remedy = parquet_instead(reason, "data_options: {revision: refs/convert/parquet}")
    return ValueError(
        f"`source` must be data that `datasets` can read, got {source!r}. There is no such file, and the Hub gave: "
        f"{reason}{remedy}"
    )


def parquet_instead(reason: str, option: str) -> str:
    """A remedy for a data set that is a program, for the end of a message; empty for any other reason."""
    if SCRIPT not in reason:
        return ""
    return f". The Hub keeps most of them as Parquet too: pass `{option}`."


def _not_blank(texts: Iterator[str], source: str) -> Iterator[str]:
    empty = True
    for text in texts:
        if text and not text.isspace():
            empty = False
            yield text
    if empty:
        raise ValueError(f"`source` must hold some text, got {source!r}, where all is blank. Name another source.")
