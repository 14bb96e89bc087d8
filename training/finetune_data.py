"""
Data for fine-tuning: rows of text or of chats, a held-out part, and examples of token ids.

Which row is held out follows from a hash of what is in it: neither the order of rows nor a seed changes it, rows added
later leave it as it is, and equal rows are on the same side.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from tqdm.auto import tqdm

from rigpt_hf.text import files
from rigpt_hf.text.sources import parquet_instead

from .templates import accepted, check_tools


IGNORED = -100
REVISION = "--data-revision refs/convert/parquet"
COLUMNS = ("messages", "text")
BATCH = 256  # texts that are tokenized at once
PASSAGE = re.compile(r".+?(?:\n[ \t]*\n\s*|\Z)", re.DOTALL)
ASKED = {"role": "user", "content": "?"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Piece(NamedTuple):
    """A unit that is held out or not as a whole: a row's text or chat, or a passage of a text file."""

    document: int
    content: str | list[dict]
    where: str


class Source(NamedTuple):
    """A row, what messages call it, and whether it is a whole text file."""

    where: str
    row: dict[str, Any]
    is_file: bool = False


class Rows:
    """
    Rows with `text` (a string) or `messages` (a list of role and content), read from disk as they are asked for.

    A text file is one document of many pieces, its passages between blank lines; any other row is one piece.

    Args:
        read: Reads the rows from the first on.
        source: Where they are from, for messages.
    """

    def __init__(self, read: Callable[[], Iterator[Source]], source: str):
        self.read, self.source = read, source
        self.blank = 0  # rows of the last time through that had neither

    def __iter__(self) -> Iterator[Piece]:
        self.blank = 0
        for index, (where, row, is_file) in enumerate(self.read()):
            messages, text = row.get("messages"), row.get("text")
            if messages is not None:
                yield Piece(index, checked_messages(messages, where), where)
            elif text is not None and not isinstance(text, str):
                raise ValueError(
                    f"`data` must have strings in the column `text`, got {type(text).__name__} in {where}. Give token "
                    "ids as text."
                )
            elif text and text.strip():
                pieces = PASSAGE.findall(text) if is_file else [text]
                yield from (Piece(index, piece, where) for piece in pieces)
            else:
                self.blank += 1


def checked_messages(messages: Any, where: str) -> list[dict]:
    """
    A conversation in which every content is a string; parts of text are joined.

    Raises:
        ValueError: if it is none, or has parts that are no text; the message names the row.
    """

    def refused(rule: str, value: Any) -> ValueError:
        return ValueError(
            f"`data` must have {rule} in the column `messages`, got {str(value)[:80]!r} in {where}. Leave the row "
            "out, or mend it."
        )

    if not isinstance(messages, list) or not messages:
        raise refused("lists of messages, each with `role` and `content`,", messages)
    plain = []
    for message in messages:
        calls = isinstance(message, dict) and message.get("tool_calls")
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise refused("lists of messages, each with `role` and `content`,", messages)
        if "content" not in message and not calls:
            raise refused("lists of messages, each with `role` and `content`,", messages)
        content = message.get("content")
        if isinstance(content, list):
            texts = [part["text"] for part in content if is_text(part)]
            content = "".join(texts) if len(texts) == len(content) else content
        if content is not None and not isinstance(content, str):
            raise refused("text, or parts of type `text` alone, as the content of every message", content)
        # A table has the same fields for all messages, so that those a message does not have are None.
        plain.append({key: value for key, value in (message | {"content": content}).items() if value is not None})
    return plain


def is_text(part: Any) -> bool:
    """Whether a part of a message's content is one of text."""
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def read_rows(data: str, split: str = "train", config: str | None = None, revision: str | None = None) -> Rows:
    """
    The rows of a file, a folder or a data set on the Hub.

    Args:
        data: A file (.txt, .jsonl, .json, .parquet), a folder of them or of `save_to_disk`, or the id of a data set.
        split, config, revision: Which part and version of a folder or data set; a single file is one split, `train`.
            A part may be a slice, such as `train[:1000]`.

    Raises:
        ValueError: if there is no such thing. While reading, if a file cannot be read or has no rows of text or chats.
    """
    path = Path(data)
    if path.exists():
        if config is not None or revision is not None:
            raise ValueError(
                f"`data_config` and `data_revision` name parts of a data set on the Hub, got one with the local "
                f"{data!r}. Leave them out."
            )
        return Rows(local_reader(path, split), data)
    if files.reader_of(data) or data.count("/") > 1 or data.startswith((".", "/", "~")):
        raise ValueError(
            f"`data` must be a file, a folder or the id of a data set, got {data!r}: no such file. Check the path."
        )
    try:
        table = datasets.load_dataset(data, split=split, name=config, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"`data` must be a file, a folder or a data set on the Hub that `datasets` can read, with the split "
            f"{split!r}, got {data!r}. There is no such file, and the Hub gave: {reason}"
            f"{parquet_instead(reason, REVISION)}"
        ) from error
    columns = [name for name in COLUMNS if name in table.column_names]
    if not columns:
        raise no_columns(data, table.column_names)
    table = table.select_columns(columns)
    return Rows(lambda: (Source(f"row {index} of {data!r}", row) for index, row in enumerate(table)), data)


def local_reader(path: Path, split: str) -> Callable[[], Iterator[Source]]:
    """Reads the rows of a split, or of slices of some, of a file or folder."""

    def rows_of(file: Path) -> Iterator[Source]:
        is_file = file.is_file() and files.reader_of(file) in ("text", None)
        for index, row in enumerate(files.rows(file, COLUMNS, no_columns, "data")):
            yield Source(f"row {index} of {str(file)!r}", row, is_file)

    parts = files.split_files(path, "data")
    reads = {name: partial(files.each, inside, rows_of) for name, inside in parts.items()}
    if split in reads:
        return reads[split]
    try:
        asked = datasets.ReadInstruction.from_spec(split)
        counts = {name: sum(1 for _ in reads[name]()) for name in re.findall(r"(?:^|\+)\s*(\w+)", split)}
        slices = [(reads[part.splitname], part.from_, part.to) for part in asked.to_absolute(counts)]
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(
            f"`data_split` must be one of {', '.join(parts)}, or a slice such as `train[:1000]`, got {split!r} of "
            f"{str(path)!r}. Correct it."
        ) from error
    return lambda: chain.from_iterable(islice(read(), start, stop) for read, start, stop in slices)


def no_columns(source: Any, columns: list[str]) -> ValueError:
    """The refusal of rows that are neither texts nor chats."""
    return ValueError(
        f"`data` must have a column `text` or a column `messages`, got {str(source)!r} with the columns "
        f"{', '.join(columns)[:200] or '(none)'}. Rename the column that holds the text."
    )


class HeldOut(NamedTuple):
    """Which pieces are held out (`[pieces]`, boolean), and a hash of all of them in order."""

    mask: np.ndarray
    fingerprint: str


def hold_out(rows: Rows, share: float, progress: bool = False) -> HeldOut:
    """
    Choose about `share` of the pieces by their hash, at least one unless `share` is 0; with a bar if asked.

    Raises:
        ValueError: if there are no pieces, or none is left to train on.
    """
    digests = [_digest(piece.content) for piece in tqdm(rows, "Reading", disable=not progress)]
    if not digests:
        raise ValueError(f"`data` must hold text, got {rows.source!r}, where all rows are empty.")
    places = np.array([int.from_bytes(digest[:6]) for digest in digests]) / 2**48  # uniform in [0, 1)
    mask = places < share
    if share and not mask.any():
        mask = places == places.min()
    if mask.all():
        kinds = len(set(digests))
        raise ValueError(
            f"`eval_share` must leave something to train on, got {share} of {len(digests)} piece(s) of text, of which "
            f"{kinds} differ(s), in {rows.source!r}. A piece is a row, or a passage of a text file between blank "
            "lines: put blank lines between passages, give more rows, or 0 to measure on what is trained on."
        )
    return HeldOut(mask, hashlib.sha256(b"".join(digests)).hexdigest())


def _digest(content: str | list[dict]) -> bytes:
    text = content.strip() if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def encode(rows: Rows, chosen: np.ndarray, tokenizer: Any, context: int, progress: bool = False) -> datasets.Dataset:
    """
    Examples from the pieces that are `chosen`: chats as they are, and documents with an end-of-text token after each,
    in parts of at most `context` tokens. Passages that are left of a text file stay one document.

    Args:
        rows: All of them.
        chosen (`[pieces]`, boolean): Which pieces to take.
        tokenizer: With a chat template if there are chats.
        context: Tokens per part of a document.
        progress: Show a bar.

    Returns:
        `datasets.Dataset`: `input_ids` and `labels`, -100 where the loss does not look, as [`trl.SFTTrainer`] takes
        them to cut or pack.

    Raises:
        ValueError: if the tokenizer lacks what this needs.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    texts: list[str] = []

    def flush() -> None:
        # So many at once, as the tokenizer has threads.
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ():
            document = np.array([*ids, _end_of_text(tokenizer)], dtype=np.int32)
            parts = (document[start : start + context] for start in range(0, len(document), context))
            pairs.extend((part, part) for part in parts if len(part) > 1)
        texts.clear()

    bar = tqdm(rows, "Tokenizing", total=len(chosen), disable=not progress)
    kept = (piece for piece, wanted in zip(bar, chosen, strict=True) if wanted)
    for (_, where), pieces in groupby(kept, key=lambda piece: (piece.document, piece.where)):
        contents: list[Any] = [piece.content for piece in pieces]
        if isinstance(contents[0], str):
            texts.append("".join(contents))
            if len(texts) == BATCH:
                flush()
        else:
            pairs.append(encode_chat(contents[0], tokenizer, where))
    flush()
    return datasets.Dataset.from_dict(
        {"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]}
    )


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "`model` must have a tokenizer with an end-of-text token to separate documents, got one without. Set "
            "`eos_token` in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def encode_chat(messages: list[dict], tokenizer: Any, where: str = "a chat") -> tuple[np.ndarray, np.ndarray]:
    """
    Token ids of a conversation by the tokenizer's chat template, and labels on the assistant's turns only.

    The template marks a turn with `{% generation %}`. A template without that mark, which TRL does not take, is asked
    for beginnings of the conversation: a turn goes from the end of the prompt for it to the end of the message, with
    the tokens that close it.

    Args:
        messages: With `role` and `content` each.
        tokenizer: A fast one, with a chat template.
        where: What to call the conversation in messages.

    Returns:
        Input ids and labels, both `[tokens]`; labels are -100 where the loss does not look.

    Raises:
        ValueError: if there is no template or it cannot say which tokens are the assistant's.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "`chat_template` must be given for rows with `messages`, got a tokenizer that has none. Pass a Jinja file "
            "with `--chat-template FILE`."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            "`model` must have a fast tokenizer (tokenizer.json) for rows with `messages`, got "
            f"{type(tokenizer).__name__}. Convert it with `AutoTokenizer`, or give text."
        )
    check_tools(messages, tokenizer, where)
    if GENERATION.search(tokenizer.get_chat_template()):
        with accepted(where):
            encoded = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
        spoken = np.array(encoded["assistant_masks"], dtype=bool)
    else:
        with accepted(where):
            text, turns = _turns(messages, tokenizer, where)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spoken = np.zeros(len(encoded["input_ids"]), dtype=bool)
        starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        for first, last in turns:
            spoken |= (starts < last) & (ends > first) & (ends > starts)
    input_ids = np.array(encoded["input_ids"], dtype=np.int32)
    return input_ids, np.where(spoken, input_ids, np.int32(IGNORED))


def _turns(messages: list[dict], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the characters (from, to) of each of the assistant's turns in it."""

    def text_of(part: list[dict], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    text, turns = text_of(messages), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = text_of(messages[: index + 1])
        if index:
            before = text_of(messages[:index], prompt=True)
        else:
            # No library renders the prompt of an empty conversation: the turn is what it adds to another one.
            turn = text_of([ASKED, message]).removeprefix(text_of([ASKED], prompt=True))
            before = after.removesuffix(turn)
        if not (after.startswith(before) and text.startswith(after)) or before == after:
            raise files.Unreadable(
                "`chat_template` must render the beginning of a conversation as the beginning of its text, which this "
                f"one does not for {where}. Mark the assistant's turns in it with {{% generation %}} and "
                "{% endgeneration %}, and pass it with `--chat-template FILE`."
            )
        turns.append((len(before), len(after)))
    return text, turns
