"""
Where a model is, a folder or an id on the Hub, and whether its small files can be read.

It needs neither torch nor transformers, so that a mistyped path is answered at once.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any

from ..command_line import is_endless, listed
from .folder import check_output
from .written import parse_json


ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
KNOWN = "the folder of a saved model or the id of a repository on the Hub"
AGAIN = "Download it again, or save it once more."
# Fields that the library looks into before it looks at them.
KINDS = {"model_type": str, "auto_map": dict, "quantization_config": dict, "architectures": list, "dtype": str}
KINDS |= {"torch_dtype": str, "id2label": dict, "label2id": dict, "problem_type": str}
GGUF = ".gguf"  # how names of such files end
TRAINED = "model"  # what a training calls the folder of its model
SHOWN = 80  # characters of a value that a message repeats

# Only files with these names are copied: a folder may hold anything.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# Files that hold a vocabulary; without one of them there is no tokenizer to load.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
# Files of tokenizers of other kinds, which nothing here can carry over.
OTHER_VOCABULARIES = ("tekken.json", "*.tiktoken", "encoder.json", "vocab.bpe", "tokenizer.*", "*.model", "*.spm")


def find_source(
    source: str | os.PathLike, argument: str = "source", revision: str | None = None, *, config: bool = True
) -> Path:
    """
    The folder of a source; of a repository on the Hub, the one in the cache to which its `config.json` is fetched.

    Args:
        source (`str` or `Path`): a folder, or the id of a repository on the Hub.
        argument (`str`, defaults to `"source"`): what error messages call it.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        config (`bool`, defaults to `True`): whether it must have a `config.json`, as all but a GGUF file has.

    Raises:
        ValueError: if it is not there, is an adapter, or has a configuration that cannot be read.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"`revision` names a version on the Hub, got {revision!r} with the folder {name!r}.")
        folder = Path(name)
        check_folder(folder, argument)
    else:
        folder = _fetched(name, argument, revision)
    if os.path.lexists(folder / ADAPTER):
        raise ValueError(
            f"`{argument}` must be a whole model, got {name!r}, which holds an adapter (`{ADAPTER}`). Merge it into "
            "its model (`merge_and_unload` of PEFT; `rigpt finetune` has --merge), give it to `rigpt generate` as "
            "--adapter, or move it out of the folder."
        )
    if config and not (folder / "config.json").is_file():
        files = [path for path in folder.iterdir() if path.suffix.lower() == GGUF]
        advice = f" Convert its file first: `rigpt convert {files[0]} my-rigpt`." if files else ""
        raise ValueError(f"`{argument}` must be {KNOWN}, got {name!r}, which has no `config.json`.{advice}")
    for file in ("config.json", "generation_config.json"):
        content = read_json(folder / file, argument) if (folder / file).is_file() else {}
        for field, kind in KINDS.items():
            if not isinstance(value := content.get(field), (kind, NoneType)):
                raise ValueError(
                    f"`{argument}` must have a `{file}` whose {field!r} is a {kind.__name__}, got "
                    f"{shown(repr(value))} in {str(folder / file)!r}. {AGAIN}"
                )
    return folder


def split_gguf(source: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """The folder of a source and the GGUF file that is meant in it: one that is named, or is the source itself."""
    if gguf_file is None and source.lower().endswith(GGUF) and os.path.isfile(source):
        return os.path.dirname(source) or os.curdir, os.path.basename(source)
    return source, gguf_file


def check_folder(folder: Path, argument: str) -> None:
    """A `ValueError` if a pipe or a device lies in the folder of a model, where libraries would wait for it."""
    with suppress(PermissionError):  # files may be readable where their names are not
        for path in folder.iterdir():
            if is_endless(path):
                check_readable(path, argument)


def check_name(name: str, argument: str) -> None:
    """Raise a `ValueError` if a name that is no folder's cannot be that of a repository on the Hub either."""
    if os.path.lexists(name):
        kind = "a file" if os.path.isfile(name) else "a link that leads nowhere"
        advice = (
            f"Convert it first: `rigpt convert {name} my-rigpt`" if name.lower().endswith(GGUF) else "Name the folder"
        )
        raise ValueError(f"`{argument}` must be {KNOWN}, got {name!r}, which is {kind}. {advice}.")
    # A folder may be meant where the first part of the name is one.
    if not HUB_ID.fullmatch(name) or ("/" in name and os.path.isdir(name.split("/")[0])):
        kind = "file" if name.lower().endswith(GGUF) else "folder"
        raise ValueError(f"`{argument}` must be {KNOWN}, got {name!r}: no such {kind}. {_spelling(name)}.")


def _spelling(name: str) -> str:
    """Advice on a name that leads nowhere: its neighbours (folders, GGUF files) that are like it, if any."""
    parent, last = os.path.split(name.rstrip("/"))
    with suppress(OSError):
        names = [it.name for it in os.scandir(parent or os.curdir) if it.is_dir() or it.name.lower().endswith(GGUF)]
        if near := get_close_matches(last, names, n=2):
            return f"Look at the spelling: there is {' and '.join(repr(os.path.join(parent, one)) for one in near)}"
    return "Look at the spelling"


def _fetched(name: str, argument: str, revision: str | None) -> Path:
    check_name(name, argument)
    from huggingface_hub import (
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        is_offline_mode,
        try_to_load_from_cache,
    )

    said = {
        errors.GatedRepoError: "shows it only to those who were given access there",
        errors.RevisionNotFoundError: f"has no revision {revision!r} of it",
        errors.RepositoryNotFoundError: "has no such repository, or a private one (see `hf auth login`)",
        errors.LocalEntryNotFoundError: "cannot be reached",
        errors.EntryNotFoundError: "has it without a `config.json`",
    }
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str) and not is_offline_mode():
            # Fails at once without a network, where a download would try for half a minute.
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except Exception as error:  # those of the connection are of many kinds
        words = next((words for kind, words in said.items() if isinstance(error, kind)), "")
        if not words:
            unreached = any(one.__name__ == "TransportError" for one in type(error).__mro__)
            words = "cannot be reached" if unreached else f"gave: {in_short(error)}"
        # Where the Hub has the repository, the spelling is right.
        there = errors.GatedRepoError, errors.RevisionNotFoundError, errors.EntryNotFoundError
        is_there = isinstance(error, there) and not isinstance(error, errors.LocalEntryNotFoundError)
        advice = f"The Hub {words}" if is_there else f"{_spelling(name)}. As an id: the Hub {words}"
        raise ValueError(f"`{argument}` must be {KNOWN}, got {name!r}: no such folder. {advice}.") from error


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        ValueError: if the file cannot be read or holds anything else; the message names it.
    """
    check_readable(path, argument)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        held = "null" if content is None else f"a {type(content).__name__}"
        problem = "" if isinstance(content, dict) else f"it holds {held} and no object"
    except json.JSONDecodeError as error:
        problem = f"it is no JSON at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 at byte {error.start}"
    except (OSError, ValueError) as error:
        problem = in_short(error)
    if problem:
        raise ValueError(f"`{argument}` must have a readable `{path.name}`, got {str(path)!r}: {problem}. {AGAIN}")
    return content


def check_readable(path: Path, argument: str) -> None:
    """A `ValueError` if a file may not be read, or is a pipe or a device, from which reading may never end."""
    if is_endless(path):
        raise ValueError(
            f"`{argument}` must have files, got {str(path)!r}, which is a pipe or a device. Put a file there, or "
            "remove it."
        )
    try:
        path.open("rb").close()
    except PermissionError as error:
        raise ValueError(
            f"`{argument}` must have files that may be read, got {str(path)!r}: {error.strerror}. Let it be read, or "
            "name another."
        ) from error
    except OSError:  # which whoever reads it says
        pass


def in_short(error: BaseException) -> str:
    """The message of an error of a library, in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return shown(f"{error.strerror}{f' ({error.filename})' if error.filename else ''}")
    text = " ".join(str(error).split())
    if isinstance(error, AttributeError):  # which names only what a library does with it
        return "a value in it is of another kind"
    if isinstance(error, (TypeError, LookupError, ArithmeticError)):
        return f"a value in it is absent, impossible or of another kind ({shown(text)})".replace("NoneType", "null")
    return shown(text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}")


def shown(value: object) -> str:
    """A value as a message repeats it: its beginning, if it is long."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def names_of(sources: Sequence[str], between: str = "/") -> list[str]:
    """
    Short names of models, which differ where their places do: the last part of a path, or the one before it where that
    is `model`, as after every pretraining; more parts where others have the same; an id on the Hub whole.

    Args:
        sources: Folders, files or ids on the Hub.
        between (`str`, defaults to `"/"`): What stands between parts; the name of a file can have no slash.
    """
    parts = [_parts(source) for source in sources]
    names: list[str] = []
    for others in range(max(map(len, parts), default=0)):
        ends = [
            each[-2:-1] if not others and len(each) > 1 and each[-1] == TRAINED else each[-others - 1 :]
            for each in parts
        ]
        names = ["/".join(end).replace("/", between) for end in ends]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _parts(source: str) -> tuple[str, ...]:
    if not os.path.exists(source):
        return (source,)
    path, home = Path(os.path.abspath(source)), Path.home()
    # Names go into results that are published; that of a person's home is nobody's business.
    return path.relative_to(home if path.is_relative_to(home) else path.anchor).parts or (path.name,)


def is_inside(path: Path, folder: Path, *caches: str | os.PathLike) -> bool:
    """Whether a file lies in a folder, links followed, or in the library's cache, whose snapshots are links."""
    real, home, *others = (Path(os.path.realpath(place)) for place in (path, folder, *caches))
    in_cache = real.parent.name == "blobs" and any(map(real.is_relative_to, (home.parent.parent / "blobs", *others)))
    return real.is_relative_to(home) or in_cache


def is_model(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if there is no model of this name, or of one of these names."""
    revision = values.get("revision") or values.get(f"revision_{name.lower()}")
    for source in listed(value):
        if source is not None:
            find_source(source, name, revision, config=not values.get("gguf_file"))


def is_model_or_file(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """The same for what may also be a single file, which whoever reads it judges."""
    is_model([source for source in listed(value) if not os.path.isfile(source)], name, values)


def is_free(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if no folder can be made here with what `--force` allows."""
    if value is not None:
        check_output(Path(value), None, bool(values.get("force")), name)
