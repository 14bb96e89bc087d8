"""
Data for fine-tuning: rows of text or of chats, a held-out part, and examples of token ids.

Which row is held out follows from a hash of what is in it: neither the order of rows nor a seed changes it, rows added
later leave it as it is, and equal rows are on the same side.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jinja2
import numpy as np

from rigpt_hf.text.sources import parquet_instead


IGNORED = -100
REVISION = "--data-revision refs/convert/parquet"
# Suffix of a file, and the loader of `datasets` for it.
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COLUMNS = ("messages", "text")
BATCH = 256  # texts that are tokenized at once
PASSAGE = re.compile(r".+?(?:\n[ \t]*\n\s*|\Z)", re.DOTALL)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Piece(NamedTuple):
    """A unit that is held out or not as a whole: a row's text or chat, or a passage of a text file."""

    document: int
    content: str | list[dict]


class Rows:
    """
    Rows with `text` (a string) or `messages` (a list of role and content), read from disk as they are asked for.

    A text file is one document of many pieces, its passages between blank lines; any other row is one piece.

    Args:
        table: The rows.
        source: Where they are from, for messages.
        passages: Whether a row is a whole text file.

    Raises:
        ValueError: if there is neither a column `text` nor a column `messages`.
    """

    def __init__(self, table: datasets.Dataset, source: str, passages: bool = False):
        self.source, self.passages = source, passages
        columns = [name for name in COLUMNS if name in table.column_names]
        if not columns:
            raise ValueError(
                f"`data` must have a column `text` or a column `messages`, got {source!r} with the columns "
                f"{', '.join(table.column_names) or '(none)'}. Rename the column that holds the text."
            )
        self.table = table.select_columns(columns)

    def __iter__(self) -> Iterator[Piece]:
        for index, row in enumerate(self.table):
            messages, text = row.get("messages"), row.get("text")
            if messages is not None:
                yield Piece(index, self._checked(index, messages))
            elif text is not None and not isinstance(text, str):
                raise ValueError(
                    f"`data` must have strings in the column `text`, got {type(text).__name__} in row {index} of "
                    f"{self.source!r}. Give token ids as text."
                )
            elif text and text.strip():
                pieces = PASSAGE.findall(text) if self.passages else [text]
                yield from (Piece(index, piece) for piece in pieces)

    def _checked(self, index: int, messages: Any) -> list[dict]:
        valid = isinstance(messages, list) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            for message in messages
        )
        if not valid or not messages:
            raise ValueError(
                "`data` must have lists of messages, each with `role` and `content`, in the column `messages`, got "
                f"{str(messages)[:80]!r} in row {index} of {self.source!r}. Leave the row out, or mend it."
            )
        # A table has the same fields for all messages, so that those a message does not have are None.
        return [{key: value for key, value in message.items() if value is not None} for message in messages]


def read_rows(
    data: str, split: str = "train", config: str | None = None, revision: str | None = None, cache: Path | None = None
) -> Rows:
    """
    The rows of a file, a folder or a data set on the Hub.

    Args:
        data: A file (.txt, .json, .jsonl, .parquet), a folder of files of one kind, or the id of a data set.
        split, config, revision: Which part and version of a folder or data set; a single file is one split, `train`.
        cache: Folder for what `datasets` makes of local files.

    Raises:
        ValueError: if there is no such thing, or it has no rows of text or chats.
    """
    path = Path(data)
    options: dict[str, Any] = {}
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        kinds = {LOADERS[file.suffix] for file in files if file.suffix in LOADERS}
        if len(kinds) != 1:
            raise ValueError(
                f"`data` must be files of one kind, {', '.join(LOADERS)}, got {data!r} with "
                f"{', '.join(sorted({file.suffix or file.name for file in files})) or 'no file'}. Name one file or "
                "another folder."
            )
        if config is not None or revision is not None:
            raise ValueError(
                f"`data_config` and `data_revision` name parts of a data set on the Hub, got one with the local "
                f"{data!r}. Leave them out."
            )
        (loader,) = kinds
        options = {"cache_dir": None if cache is None else str(cache)}
        options |= {"sample_by": "document"} if loader == "text" else {}
        options |= {"data_dir": data} if path.is_dir() else {"data_files": [data]}
    elif path.suffix in LOADERS or data.count("/") > 1 or data.startswith((".", "/", "~")):
        raise ValueError(f"`data` must be a file, a folder or the id of a data set, got {data!r}: no such file.")
    else:
        loader, options = data, {"name": config, "revision": revision}
    try:
        table = datasets.load_dataset(loader, split=split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"`data` must be a file, a folder or a data set on the Hub that `datasets` can read, with the split "
            f"{split!r}, got {data!r}: {reason}{parquet_instead(reason, REVISION)}"
        ) from error
    return Rows(table, data, passages=loader == "text")


class HeldOut(NamedTuple):
    """Which pieces are held out (`[pieces]`, boolean), and a hash of all of them in order."""

    mask: np.ndarray
    fingerprint: str


def hold_out(rows: Rows, share: float) -> HeldOut:
    """
    Choose about `share` of the pieces by their hash, at least one unless `share` is 0.

    Raises:
        ValueError: if there are no pieces, or none is left to train on.
    """
    digests = [_digest(piece.content) for piece in rows]
    if not digests:
        raise ValueError(f"`data` must hold text, got {rows.source!r}, where all rows are empty.")
    places = np.array([int.from_bytes(digest[:6]) for digest in digests]) / 2**48  # uniform in [0, 1)
    mask = places < share
    if share and not mask.any():
        mask = places == places.min()
    if mask.all():
        raise ValueError(
            f"`eval_share` must leave something to train on, got {share} of {len(digests)} piece(s) of text in "
            f"{rows.source!r}. Give more data, or 0 to measure on what is trained on."
        )
    return HeldOut(mask, hashlib.sha256(b"".join(digests)).hexdigest())


def _digest(content: str | list[dict]) -> bytes:
    text = content.strip() if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def encode(rows: Rows, chosen: np.ndarray, tokenizer: Any, context: int) -> datasets.Dataset:
    """
    Examples from the pieces that are `chosen`: chats as they are, and documents with an end-of-text token after each,
    in parts of at most `context` tokens. Passages that are left of a text file stay one document.

    Args:
        rows: All of them.
        chosen (`[pieces]`, boolean): Which pieces to take.
        tokenizer: With a chat template if there are chats.
        context: Tokens per part of a document.

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

    kept = (piece for piece, wanted in zip(rows, chosen, strict=True) if wanted)
    for index, pieces in groupby(kept, key=lambda piece: piece.document):
        contents: list[Any] = [piece.content for piece in pieces]
        if isinstance(contents[0], str):
            texts.append("".join(contents))
            if len(texts) == BATCH:
                flush()
        else:
            pairs.append(encode_chat(contents[0], tokenizer, f"row {index} of {rows.source!r}"))
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
    try:
        if GENERATION.search(tokenizer.get_chat_template()):
            encoded = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
            spoken = np.array(encoded["assistant_masks"], dtype=bool)
        else:
            text, turns = _turns(messages, tokenizer, where)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            spoken = np.zeros(len(encoded["input_ids"]), dtype=bool)
            starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
            for first, last in turns:
                spoken |= (starts < last) & (ends > first) & (ends > starts)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"`data` must have chats that the chat template accepts, got {where}: {str(error).strip()}. Leave it out, "
            "or give another template with `--chat-template FILE`."
        ) from error
    input_ids = np.array(encoded["input_ids"], dtype=np.int32)
    return input_ids, np.where(spoken, input_ids, np.int32(IGNORED))


def _turns(messages: list[dict], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the characters (from, to) of each of the assistant's turns in it."""

    def render(count: int, prompt: bool) -> str:
        if not count:
            return ""  # the library renders no empty conversation
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    text, turns = render(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                "`chat_template` must render the beginning of a conversation as the beginning of its text, which this "
                f"one does not for {where}. Mark the assistant's turns in it with {{% generation %}} and "
                "{% endgeneration %}, and pass it with `--chat-template FILE`."
            )
        turns.append((len(before), len(after)))
    return text, turns
