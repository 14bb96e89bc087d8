"""`publish`: one commit on the Hub, so that a repository is never half there, and errors that say what to do."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..version import __version__
from .repository import RepositoryFile, check_no_token, foreign, is_managed, repository_files


# The class of whatever HTTP library this version of the client is built on.
TransportError: Any = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class PublishedReport:
    """
    What was published.

    Args:
        repo_id (`str`): with its owner.
        url (`str`): of the commit's files.
        commit (`str`): to pin when loading.
        revision (`str`): the branch that it is on.
        files (`tuple[RepositoryFile, ...]`): all that the model consists of there.
        removed (`tuple[str, ...]`): files of an earlier model that went in the same commit.
        left_out (`tuple[str, ...]`): files of the folder that were not published.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    files: tuple[RepositoryFile, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]


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
    results: str | Path | None = None,
    card: str | Path | None = None,
    facts: str | Path | None = None,
    token: str | None = None,
    force: bool = False,
    console: Any = None,
) -> PublishedReport:
    """
    Put a saved RiGPT on the Hub, with its code, so that anyone loads it with `trust_remote_code=True`.

    Everything is checked before anything is sent, and appears in one commit. Files of an earlier RiGPT in the
    repository that this one lacks go in the same commit; other files there stay.

    Args:
        folder, results, card, facts: as for [`repository_files`].
        repo_id (`str`): such as "me/my-model"; without an owner it is that of the token. Made if there is none.
        private (`bool`, defaults to `False`): make a new repository private.
        revision (`str`, *optional*): branch, made if there is none; "main" if not given.
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
    say = console.print if console is not None else lambda text: None
    token = checked_token(token)
    say(f"Checking {folder}")
    contents = repository_files(folder, repo_id=repo_id, results=results, card=card, facts=facts, force=force)
    check_no_token(contents.files, token)
    for note in contents.notes:
        say(note)
    branch = revision or constants.DEFAULT_REVISION
    api = HfApi(token=token, library_name="rigpt_hf", library_version=__version__)
    with plain_errors(repo_id, token, api.endpoint):
        repo_id = with_owner(repo_id, api.whoami())
        contents = contents.for_repository(repo_id)
        existing = _existing(api, repo_id, branch)
        _check_existing(existing, repo_id, private, force)
        if existing is None:
            # None leaves it to the settings of an organization.
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch != constants.DEFAULT_REVISION and not (existing and existing.has_branch):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    published = {file.path for file in contents.files}
    removed = sorted(
        path for path in (existing.paths if existing else ()) if is_managed(path) and path not in published
    )
    say(f"Sending {len(contents.files)} files to {repo_id}")
    with plain_errors(repo_id, token, api.endpoint, sending=True):
        additions = [CommitOperationAdd(file.path, file.content) for file in contents.files]
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in removed)],
            commit_message="Publish RiGPT",
            revision=branch,
        )
    return PublishedReport(
        repo_id=repo_id,
        url=f"{api.endpoint}/{repo_id}/tree/{commit.oid}",
        commit=commit.oid,
        revision=branch,
        files=contents.files,
        removed=tuple(removed),
        left_out=contents.left_out,
    )


def check_repo_id(repo_id: str) -> None:
    """A `ValueError` if there can be no repository of this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo` must be a name such as me/my-model, of letters, digits, '-', '_' and '.', got {repo_id!r}: "
            f"{' '.join(str(error).split())}"
        ) from error


def check_revision(revision: str | None) -> None:
    """A `ValueError` if no branch can have this name."""
    if revision is None:
        return
    if (
        not revision.strip()
        or revision.startswith("refs/")
        or re.fullmatch(r"[0-9a-f]{40}", revision)
        or (re.search(r"[\s~^:?*\[\\]|\.\.|//|^[./-]|[./]$", revision))
    ):
        raise ValueError(
            f"`revision` must be the name of a branch, got {revision!r}. A commit gets its name when it is published; "
            "tags are set on the Hub."
        )


def checked_token(token: str | None) -> str:
    """A token, or that of the machine; a `ValueError` that does not show it if there is none or it cannot be one."""
    token = token if token is not None else get_token()
    advice = "Make one with the right to write in your settings on the Hub, then say hf auth login, or set HF_TOKEN."
    if not token:
        raise ValueError(f"`token` must be an access token of the Hub, got none. {advice}")
    # Anything else the HTTP library refuses with an error that shows it.
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"`token` must be one word of ASCII characters, got something else (not shown). {advice}")
    return token


def with_owner(repo_id: str, account: dict[str, Any]) -> str:
    """A repository's name with its owner; a `ValueError` if the account may only read."""
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(
            f"`token` must have the right to write, got one of {account['name']!r} that may only read. Make another "
            "in your settings on the Hub, then say hf auth login, or set HF_TOKEN."
        )
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def _existing(api: HfApi, repo_id: str, branch: str) -> _Existing | None:
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    private, has_branch = bool(info.private), True
    try:
        info = api.model_info(repo_id, revision=branch)
    except RevisionNotFoundError:
        has_branch = False  # a new branch starts from the files of the default one
    paths = tuple(sibling.rfilename for sibling in info.siblings or ())
    model_type = None
    if "config.json" in paths:
        with tempfile.TemporaryDirectory() as place:
            config = api.hf_hub_download(repo_id, "config.json", revision=info.sha, local_dir=place)
            try:
                model_type = str(json.loads(Path(config).read_text(encoding="utf-8")).get("model_type"))
            except (ValueError, AttributeError):
                model_type = "unknown"
    return _Existing(private, has_branch, paths, model_type)


def _check_existing(existing: _Existing | None, repo_id: str, private: bool, force: bool) -> None:
    if existing is None:
        return
    if private and not existing.private:
        raise ValueError(
            f"`private` is for a new repository, and {repo_id!r} is there and public. Make it private in its settings "
            "on the Hub first, or name another."
        )
    other = foreign(existing.paths, existing.model_type)
    if other and not force:
        raise ValueError(
            f"`repo` must be new, or hold a RiGPT to update, got {repo_id!r}, which holds {other}. Name another, or "
            "pass `force=True` to put this model in its place."
        )


@contextmanager
def plain_errors(repo_id: str, token: str, endpoint: str, sending: bool = False) -> Iterator[None]:
    """Errors of the client and of the network as one line that says what to do, and never shows the token."""
    try:
        yield
    except Exception as error:
        chain = list(_causes(error))
        answer = next((one for one in chain if isinstance(one, HfHubHTTPError)), None)
        network = any(isinstance(one, (TransportError, OSError)) for one in chain)
        if answer is not None:
            message = _refusal(answer, repo_id)
        elif isinstance(error, OfflineModeIsEnabled):
            message = "`repo` needs the Hub, and HF_HUB_OFFLINE forbids to reach it. Unset it and try again."
        elif sending and (network or isinstance(error, RuntimeError)):
            message = (
                f"The upload to {repo_id!r} broke off ({_short(chain[-1])}). Say the same command again: what has "
                "arrived is not sent again, and the repository changes only once all of it is there."
            )
        elif network:
            message = (
                f"`repo` needs the Hub, and {endpoint} cannot be reached ({_short(chain[-1])}). Nothing was sent. "
                "Check the network, and HF_ENDPOINT if you set it, then try again."
            )
        elif type(error) is ValueError and not sending:
            raise
        elif isinstance(error, ValueError):
            message = f"The Hub would not take what is published to {repo_id!r}: {_short(error)}"
        else:
            raise
        shown = any(token in repr(one) for one in chain)
        # A server may repeat what it was sent; --debug would print that.
        raise ValueError(message.replace(token, "[token]")) from (None if shown else error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    said = " ".join(str(error.server_message or "").split())[:300]
    reason = f"{status}: {said}" if said else str(status)
    if status == 401:
        return (
            f"`token` must be one that the Hub accepts, got one that it refuses ({reason}). Make another in your "
            "settings on the Hub, then say hf auth login, or set HF_TOKEN, which comes first."
        )
    if status == 403:
        return (
            f"`token` must have the right to write to {repo_id!r}, got one that has not ({reason}). Give it that "
            "right in your settings on the Hub, or name a repository of your own."
        )
    return f"The Hub refused what is published to {repo_id!r} ({reason}). Nothing was changed there by this commit."
