"""The Hub for the owner of a token: one commit at a time, and errors that say what to do and never show the token."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..command_line import ACCESS_TOKEN
from ..version import __version__


# The class of whatever HTTP library this version of the client is built on.
TransportError: Any = HfHubHTTPError.__mro__[1]
IN_BYTES = re.compile(ACCESS_TOKEN.pattern.encode())
# Bytes of a file in GGUF in which its header lies, with the vocabulary.
GGUF_HEADER = 2**26
ADVICE = "in your settings on the Hub, then say hf auth login, or set HF_TOKEN"


class Hub:
    """
    The Hub, as the owner of a token sees it.

    Args:
        token (`str`, *optional*): that of `hf auth login` or HF_TOKEN if not given. It is sent to the Hub only.

    Raises:
        ValueError: if there is none or it cannot be one; the message does not show it.
    """

    def __init__(self, token: str | None):
        self.token = checked_token(token)
        self.api = HfApi(token=self.token, library_name="rigpt_hf", library_version=__version__)

    def with_owner(self, repo_id: str) -> str:
        """A repository's name with its owner; a `ValueError` if the account may only read."""
        account = self.api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(
                f"`token` must have the right to write, got one of {account['name']!r} that may only read. Make "
                f"another {ADVICE}."
            )
        return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, Path | bytes],
        removed: Iterable[str] = (),
        *,
        message: str,
        revision: str | None = None,
        repo_type: str | None = None,
    ) -> str:
        """
        Files put into a repository, and others removed there, in one commit.

        Args:
            repo_id (`str`): with its owner.
            files (`Mapping[str, Path | bytes]`): what they hold, or where that is, by name.
            removed (`Iterable[str]`): names of those that go.
            message, revision, repo_type: as for `HfApi.create_commit`.

        Returns:
            `str`: the commit.

        Raises:
            ValueError: if the Hub refuses or the connection breaks; what has arrived is not sent again next time.
        """
        operations: list[Any] = [
            *(CommitOperationAdd(path, content) for path, content in files.items()),
            *(CommitOperationDelete(path, is_folder=False) for path in removed),
        ]
        with self.plain_errors(repo_id, sending=True):
            # `upload_folder` makes several commits of what takes long, where hf_xet is installed.
            return self.api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, repo_type=repo_type
            ).oid

    def collect(self, repo_id: str, title: str) -> str:
        """
        Put a model into a collection of its owner, which is made if there is none of this title.

        Returns:
            `str`: the address of the collection.

        Raises:
            ValueError: if the Hub refuses.
        """
        with self.plain_errors(repo_id):
            found = self.api.create_collection(title, namespace=repo_id.split("/")[0], exists_ok=True)
            self.api.add_collection_item(found.slug, repo_id, "model", exists_ok=True)
        return f"{self.api.endpoint}/collections/{found.slug}"

    @contextmanager
    def plain_errors(self, repo_id: str, sending: bool = False) -> Iterator[None]:
        """Errors of the client and of the network as one line that says what to do, and never shows the token."""
        try:
            yield
        except Exception as error:
            chain = list(_causes(error))
            message = self._words(error, chain, repo_id, sending)
            if message is None:
                raise
            shown = any(self.token in repr(one) for one in chain)
            # A server may repeat what it was sent; --debug would print that.
            raise ValueError(message.replace(self.token, "[token]")) from (None if shown else error)

    def _words(self, error: Exception, chain: list[BaseException], repo_id: str, sending: bool) -> str | None:
        """The message for an error and its causes; `None` if it speaks for itself, or is none of the Hub's."""
        network, last = any(isinstance(one, (TransportError, OSError)) for one in chain), in_one_line(chain[-1])
        if answer := next((one for one in chain if isinstance(one, HfHubHTTPError)), None):
            return _refusal(answer, repo_id)
        if isinstance(error, OfflineModeIsEnabled):
            return "`repo` needs the Hub, and HF_HUB_OFFLINE forbids to reach it. Unset it and try again."
        if sending and (network or isinstance(error, RuntimeError)):
            return (
                f"The upload to {repo_id!r} broke off ({last}). Say the same command again: what has "
                "arrived is not sent again, and the repository changes only once all of it is there."
            )
        if network:
            return (
                f"`repo` needs the Hub, and {self.api.endpoint} cannot be reached ({last}). Nothing was "
                "sent. Check the network, and HF_ENDPOINT if you set it, then try again."
            )
        # Our own speak for themselves.
        if not isinstance(error, ValueError) or (type(error) is ValueError and not sending):
            return None
        return f"The Hub would not take what is published to {repo_id!r}: {in_one_line(error)}"


def checked_token(token: str | None) -> str:
    """A token, or that of the machine; a `ValueError` that does not show it if there is none or it cannot be one."""
    token = token if token is not None else get_token()
    advice = f"Make one with the right to write {ADVICE}."
    if not token:
        raise ValueError(f"`token` must be an access token of the Hub, got none. {advice}")
    # Anything else the HTTP library refuses with an error that shows it.
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"`token` must be one word of ASCII characters, got something else (not shown). {advice}")
    return token


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def check_no_token(files: Iterable[Any], token: str | None = None) -> None:
    """A `ValueError` if the text in a `RepositoryFile` holds `token` or any other access token of the Hub."""
    for file in files:
        content = _text_in(file)
        if IN_BYTES.search(content) or (token and token.encode() in content):
            raise ValueError(
                f"`folder` must not hold an access token, got one in {file.path!r}. Remove it there, and revoke it in "
                "your settings on the Hub if others may have seen it."
            )


def _text_in(file: Any) -> bytes:
    """All of a file, and of weights the header, which holds names and what else somebody noted."""
    if file.path.endswith(".gguf"):
        with file.content.open("rb") as opened:
            return opened.read(GGUF_HEADER)
    if not file.path.endswith(".safetensors"):
        return file.read()
    with BytesIO(file.content) if isinstance(file.content, bytes) else file.content.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return opened.read(length) if length <= file.size - 8 else b""


def in_one_line(error: BaseException) -> str:
    """The type of an error and the beginning of its message."""
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
