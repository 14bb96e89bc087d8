"""`publish`: one commit on the Hub, so that a repository is never half there."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.adapters import ADAPTER_WEIGHTS
from ..checkpoints.read import name_some
from ..checkpoints.source import ADAPTER
from ..checkpoints.written import parse_json
from ..model_cards.siblings import ADAPTERS, GGUF
from .contents import PICKLES, RepositoryFile
from .hub import Hub, check_no_token
from .repository import check_there, is_managed, repository_files
from .siblings import BESIDE, kind_of


# What a file system takes as a name, as a branch is one on the Hub.
LONGEST_REVISION = 240
# What a repository holds.
IN_WORDS = {None: "a RiGPT", ADAPTERS: "an adapter", GGUF: "files in GGUF"}


@dataclass(frozen=True)
class PublishedReport:
    """
    A published model.

    Args:
        repo_id (`str`): with its owner.
        url (`str`): of the commit's files.
        commit (`str`): to pin when loading.
        revision (`str`): the branch that it is on.
        files (`tuple[RepositoryFile, ...]`): all that the model consists of there.
        removed (`tuple[str, ...]`): files of an earlier model that went in the same commit.
        left_out (`tuple[str, ...]`): files of the folder that were not published.
        load (`str`): the line that loads it from there.
        collection (`str`, *optional*): address of the collection that it was put into.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    files: tuple[RepositoryFile, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    load: str = ""
    collection: str | None = None


@dataclass(frozen=True)
class _Existing:
    """A repository as it is before: whether it is private, whether it has the branch, and its files there."""

    private: bool
    has_branch: bool
    paths: tuple[str, ...]
    model_type: str | None


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    collection: str | None = None,
    results: str | Path | None = None,
    card: str | Path | None = None,
    metadata: str | Path | None = None,
    token: str | None = None,
    force: bool = False,
    console: Any = None,
) -> PublishedReport:
    """
    Put a saved RiGPT on the Hub, with its code, so that anyone loads it with `trust_remote_code=True`; or an adapter
    of one, or files in GGUF.

    Everything is checked before anything is sent, and appears in one commit. Files of an earlier RiGPT in the
    repository that this one lacks go in the same commit; other files there stay.

    Args:
        folder, base, results, card, metadata: as for [`repository_files`].
        repo_id (`str`): such as "me/my-model"; without an owner it is that of the token. Made if there is none.
        private (`bool`, defaults to `False`): make a new repository private.
        revision (`str`, *optional*): branch, made if there is none; "main" if not given.
        collection (`str`, *optional*): title of a collection of the same owner to put it into; made if there is none.
        token (`str`, *optional*): that of `hf auth login` or HF_TOKEN if not given. It is sent to the Hub only.
        force (`bool`, defaults to `False`): overwrite a repository that holds another kind of model, and publish code
            that is not that of the installed package.
        console (`rich.console.Console`, *optional*): to say what is being done.

    Returns:
        `PublishedReport`.

    Raises:
        ValueError: if an argument is impossible, the folder is not fit to be published, the Hub refuses, cannot be
            reached, or the connection breaks; the message says what to do.
    """
    check_repo_id(repo_id)
    check_revision(revision)
    check_collection(collection)
    say = console.print if console is not None else lambda text: None
    check_there(Path(folder))  # before anybody is asked for a token
    hub = Hub(token)
    say(f"Checking {folder}")
    contents = repository_files(
        folder, repo_id=repo_id, base=base, results=results, card=card, metadata=metadata, force=force
    )
    kind = kind_of(Path(folder))
    check_no_token(contents.files, hub.token)
    for note in contents.notes:
        say(note)
    branch = revision or constants.DEFAULT_REVISION
    with hub.plain_errors(repo_id):
        repo_id = hub.with_owner(repo_id)
        contents = contents.for_repository(repo_id)
        existing = _existing(hub.api, repo_id, branch)
        _check_existing(existing, repo_id, private, force, kind)
        if existing is None:
            # None leaves it to the settings of an organization.
            hub.api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch != constants.DEFAULT_REVISION and not (existing and existing.has_branch):
            hub.api.create_branch(repo_id, branch=branch, exist_ok=True)
    files = {file.path: file.content for file in contents.files}
    removed = tuple(sorted(path for path in _replaceable(existing, kind) if path not in files))
    say(f"Sending {len(files)} files to {repo_id}")
    commit = hub.commit(repo_id, files, removed, message="Publish RiGPT", revision=branch)
    url = f"{hub.api.endpoint}/{repo_id}/tree/{commit}"
    try:
        place = None if collection is None else hub.collect(repo_id, collection)
    except ValueError as error:
        raise ValueError(
            f"The model is published at {url}, and is in no collection: {error} The same command tries again."
        ) from error
    load = {
        None: f'AutoModelForCausalLM.from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)',
        ADAPTERS: f'PeftModel.from_pretrained(model, "{repo_id}", revision="{commit}")',
        GGUF: f"llama-cli -hf {repo_id}",
    }[kind]
    return PublishedReport(repo_id, url, commit, branch, contents.files, removed, contents.left_out, load, place)


def check_repo_id(repo_id: str) -> None:
    """A `ValueError` if there can be no repository of this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo` must be the name of a repository on the Hub such as me/my-model, of letters, digits, '-', '_' "
            f"and '.', and no folder, got {repo_id!r}: {' '.join(str(error).split()).rstrip('.')}. Name one; "
            "`--dry-run` sends nothing."
        ) from error


def check_revision(revision: str | None) -> None:
    """A `ValueError` if no branch can have this name."""
    if revision is None:
        return
    if (
        not revision.strip()
        or len(revision) > LONGEST_REVISION
        or revision.startswith("refs/")
        or re.fullmatch(r"[0-9a-f]{40}", revision)
        or (re.search(r"[\s~^:?*\[\\]|\.\.|//|^[./-]|[./]$", revision))
    ):
        raise ValueError(
            f"`revision` must be the name of a branch, got {revision!r:.80}. A commit gets its name when it is "
            "published; tags are set on the Hub."
        )


def check_collection(title: str | None) -> None:
    """A `ValueError` if no collection can have this title."""
    if title is not None and (not title.strip() or len(title.splitlines()) > 1):
        raise ValueError(f"`collection` must be a title, one line with something in it, got {title!r:.80}. Name one.")


def _existing(api: HfApi, repo_id: str, branch: str) -> _Existing | None:
    has_branch = True
    try:
        info = api.model_info(repo_id, revision=branch)
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        info, has_branch = api.model_info(repo_id), False  # a new branch starts from the files of the default one
    paths = tuple(sibling.rfilename for sibling in info.siblings or ())
    model_type = None
    if "config.json" in paths:
        with tempfile.TemporaryDirectory() as place:
            config = api.hf_hub_download(repo_id, "config.json", revision=info.sha, local_dir=place)
            try:
                model_type = str(parse_json(Path(config).read_text(encoding="utf-8")).get("model_type"))
            except (ValueError, AttributeError):
                model_type = "unknown"
    return _Existing(bool(info.private), has_branch, paths, model_type)


def _replaceable(existing: _Existing | None, kind: str | None) -> list[str]:
    """
    The files that go with what was there before: all that belongs to a model, and of an adapter or files in GGUF what
    would be taken for a part of what comes. An adapter that lies beside a model is somebody's own.
    """
    if existing is None:
        return []
    is_model = existing.model_type is not None
    parts = () if is_model else (ADAPTER, ADAPTER_WEIGHTS, *BESIDE[ADAPTERS], *BESIDE[GGUF])
    whole = is_model or kind is None
    return [path for path in existing.paths if path in parts or (whole and is_managed(path))]


def _check_existing(
    existing: _Existing | None, repo_id: str, private: bool, force: bool, kind: str | None = None
) -> None:
    if existing is None:
        return
    if private and not existing.private:
        raise ValueError(
            f"`private` is for a new repository, and {repo_id!r} is there and public. Make it private in its settings "
            "on the Hub first, or name another."
        )
    other, ours = foreign(existing.paths, existing.model_type, kind), IN_WORDS[kind]
    if other and not force:
        raise ValueError(
            f"`repo` must be new, or hold {ours} to update, got {repo_id!r}, which holds {other}. Name another, or "
            "pass `force=True` to put this model in its place."
        )


def foreign(paths: Iterable[str], model_type: str | None, kind: str | None = None) -> str | None:
    """
    The content of a repository that would be overwritten by another kind, in words; `None` if there is none.

    Args:
        paths, model_type: Of the repository: its files, and what its `config.json` says if there is one.
        kind (`str`, *optional*): What is published, as `kind_of` says.
    """
    if model_type is not None:
        return None if model_type == "rigpt" and kind is None else f"a model of type {model_type!r}"
    paths = list(paths)
    weights = [path for path in paths if PurePosixPath(path).suffix in (".safetensors", ".gguf", ".h5", *PICKLES)]
    same = {
        ADAPTERS: ADAPTER in paths and set(weights) == {ADAPTER_WEIGHTS},
        GGUF: all(path.endswith(".gguf") for path in weights),
    }
    if not weights or (kind is not None and same[kind]):
        return None
    return f"{name_some(weights)} without a `config.json`"
