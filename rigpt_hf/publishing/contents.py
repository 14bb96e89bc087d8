"""The files of a folder that go into a repository on the Hub, whatever is published, and what no folder may hold."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.certificate import CERTIFICATE_NAME, Certificate
from ..checkpoints.companions import TEMPLATE_FILES, TOKENIZER_FILES, VOCABULARY_FILES
from ..checkpoints.read import load_tokenizer, name_some
from ..checkpoints.source import is_inside, read_json
from ..checkpoints.written import WRITTEN
from ..model_cards.card import CARD
from ..model_cards.marker import for_repository
from ..text.paths import without_path
from .hub import check_no_token
from .notebook import NOTEBOOK, for_place


RECORDS = (CERTIFICATE_NAME, "merge.json", "finetune.json", "quantize.json", "prune.json")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
TEMPLATES = "additional_chat_templates/*.jinja"
# Scores that a person states of benchmarks on the Hub, whose leaderboards read them.
SCORES = ".eval_results/*.yaml"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# `Trainer` leaves its arguments beside every model that it saves; they stay at home.
HARMLESS = ("training_args.bin",)
STATE = ("optimizer.*", "scheduler.*", "rng_state*", "checkpoint.json", "*.distcp")
CHECKPOINTS = re.compile(r"(checkpoint-\d+|step-\d{8,}|global_step\d+)")


@dataclass(frozen=True)
class RepositoryFile:
    """
    One file of a repository.

    Args:
        path (`str`): its name there.
        content (`Path` or `bytes`): where it comes from, or what it holds.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def read(self) -> bytes:
        """All of it; for files that are not weights."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class RepositoryContents:
    """
    The files that are published, and the names of those that are not.

    Args:
        files (`tuple[RepositoryFile, ...]`): by name.
        left_out (`tuple[str, ...]`): files and folders of the model's folder that stay at home, but for the record.
        notes (`tuple[str, ...]`): lines that say what people may not expect.
    """

    files: tuple[RepositoryFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files)

    def for_repository(self, repo_id: str) -> "RepositoryContents":
        """The same, with a card of our making that loads the model from there, now that the owner is known."""
        made = {CARD: lambda text: for_repository(text.decode(), repo_id).encode()}
        made[NOTEBOOK] = lambda text: for_place(text, repo_id)
        files = [
            RepositoryFile(file.path, made[file.path](file.content))
            if file.path in made and isinstance(file.content, bytes)
            else file
            for file in self.files
        ]
        return replace(self, files=tuple(files))


def gathered(
    folder: Path, names: Iterable[str], made: Iterable[RepositoryFile], notes: Iterable[str] = ()
) -> RepositoryContents:
    """
    Files of a folder by their names, and others that were made here.

    Raises:
        ValueError: if one is a link to elsewhere, cannot be read, or holds an access token.
    """
    names = list(dict.fromkeys(names))
    files = [*(RepositoryFile(name, content_of(folder, name)) for name in names), *made]
    check_no_token(files)
    for file in files:
        if fnmatch(file.path, SCORES):
            _check_scores(folder, file)
    published = {file.path for file in files} | {CARD, WRITTEN}
    inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    left_out = sorted(name for name in inside if name not in published)
    return RepositoryContents(tuple(sorted(files, key=lambda file: file.path)), tuple(left_out), tuple(notes))


def names_beside(folder: Path) -> list[str]:
    """The files of a tokenizer, if it has a vocabulary, templates of chats, licences, and scores of benchmarks."""
    single = (*TOKENIZER_FILES, *TEMPLATE_FILES) if has_vocabulary(folder) else TEMPLATE_FILES
    more = (path for pattern in (*LICENCES, TEMPLATES, SCORES) for path in folder.glob(pattern) if path.is_file())
    return [
        *(name for name in single if (folder / name).is_file()),
        *(path.relative_to(folder).as_posix() for path in more),
    ]


def _check_scores(folder: Path, file: RepositoryFile) -> None:
    """A `ValueError` for scores that the Hub would not show."""
    try:
        entries = yaml.safe_load(file.read())
        if not isinstance(entries, list) or not entries:
            raise ValueError("there must be a list of entries")
        for entry in entries:
            validate_repo_id(entry["dataset"]["id"])
            task, value = entry["dataset"]["task_id"], entry["value"]
            if not (isinstance(task, str) and task) or type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError("`task_id` is a name, and `value` a number")
    except (LookupError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:100]
        problem = f" with {file.path}: {type(error).__name__}: {reason}"
        advice = "An entry has `dataset: {id: ..., task_id: ...}` and `value`; ids are those of benchmarks on the Hub."
        raise refusal(folder, "hold scores as the Hub reads them", problem, advice) from error


def refusal(folder: Path, rule: str, problem: str, advice: str) -> ValueError:
    """The error of a folder that must do something and does not."""
    return ValueError(f"`folder` must {rule}, got {str(folder)!r}{problem}. {advice}".strip())


def check_nothing_forbidden(folder: Path) -> None:
    """A `ValueError` if a folder holds the state of a training, or pickles."""

    def state(path: Path) -> bool:
        return bool(CHECKPOINTS.fullmatch(path.name)) or any(fnmatch(path.name, pattern) for pattern in STATE)

    def pickled(path: Path) -> bool:
        return path.is_file() and path.suffix in PICKLES and path.name not in HARMLESS

    rules: tuple[tuple[Callable[[Path], bool], str, str], ...] = (
        (state, "the state of a training", "Save the finished model to a folder of its own, and publish that"),
        (pickled, "pickles, which run code when they are read", "Remove them, or save the model as safetensors"),
    )
    for forbidden, what, advice in rules:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if forbidden(path)]
        if names:
            raise ValueError(f"`folder` must not hold {what}, got {name_some(names)} in {str(folder)!r}. {advice}.")


def check_inside(folder: Path, name: str) -> None:
    """A `ValueError` if a file lies elsewhere, but for the library's cache, whose snapshots are made of links."""
    if not is_inside(folder / name, folder, constants.HF_HUB_CACHE):
        place = os.path.realpath(folder / name)
        problem, advice = f" with {name!r}, a link to {place!r:.200}", "Put the file itself there or remove it."
        raise refusal(folder, "hold itself all that is published", problem, advice)


def without_paths(record: Any) -> Any:
    """A record as JSON holds it, without the paths of this machine."""
    if isinstance(record, dict):
        return {key: without_paths(part) for key, part in record.items()}
    if isinstance(record, list):
        return [without_paths(part) for part in record]
    return without_path(record) if isinstance(record, str) else record


def as_json(record: Any) -> bytes:
    """A record as a file."""
    return (json.dumps(record, indent=2) + "\n").encode()


def content_of(folder: Path, name: str) -> Path | bytes:
    """A file as it is, or, of records of a model, without the paths of this machine."""
    check_inside(folder, name)
    if name not in RECORDS:
        return folder / name
    # Of a certificate goes what follows from its numbers, whatever the file says.
    record = Certificate.load(folder).to_dict() if name == CERTIFICATE_NAME else read_json(folder / name, "folder")
    return as_json(without_paths(record))


def has_vocabulary(folder: Path) -> bool:
    """Whether there is a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def check_tokenizer(folder: Path) -> None:
    """A `ValueError` if there is a tokenizer that does not load."""
    if not has_vocabulary(folder):
        return
    try:
        load_tokenizer(folder, argument="folder")
    except ValueError as error:
        rule = "hold a tokenizer that loads or none"
        raise refusal(folder, rule, f": {error}", "Save the tokenizer once more.") from error
