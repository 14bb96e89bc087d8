"""`publish_space`: the Space of a model that is on the Hub, in one commit."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from .hub import Hub
from .repository import subject_of
from .rotation_view import exported
from .space import FILES, TITLE, build_space
from .upload import PublishedReport, check_repo_id


@dataclass(frozen=True)
class SpaceReport:
    """
    What was published.

    Args:
        repo_id (`str`): of the Space.
        url (`str`): where people look at it.
        commit (`str`): that holds it.
    """

    repo_id: str
    url: str
    commit: str


def publish_space(
    model: PublishedReport,
    repo_id: str | None = None,
    *,
    private: bool = False,
    baseline: str | None = None,
    title: str = TITLE,
    token: str | None = None,
    force: bool = False,
    console: Any = None,
) -> SpaceReport:
    """
    Put a Space on the Hub in which people turn a published RiGPT and a stock model by an angle; see [`build_space`].

    Args:
        model (`PublishedReport`): What [`publish`] returned; the Space loads just this commit.
        repo_id (`str`, *optional*): Of the Space; that of the model if not given, as the two do not get in each
            other's way.
        private (`bool`, defaults to `False`): Make a new Space private.
        baseline (`str`, *optional*), title (`str`): As for [`build_space`].
        token (`str`, *optional*): As for [`publish`].
        force (`bool`, defaults to `False`): Whether another kind of Space may be overwritten.
        console (`rich.console.Console`, *optional*): To say what is being done.

    Raises:
        ValueError: if the model has no tokenizer or its repository is private, the Space is somebody's other one, or
            the Hub refuses.
    """
    repo_id = repo_id or model.repo_id
    hub = Hub(token)
    with tempfile.TemporaryDirectory() as place:
        folder = build_space(
            Path(place) / "space",
            repo_id=model.repo_id,
            model=model.repo_id,
            revision=model.commit,
            baseline=baseline,
            title=title,
        )
        with hub.plain_errors(repo_id):
            # An organization may make new repositories private by itself.
            _check_public(hub.api, model.repo_id)
            _check_existing(hub.api, repo_id, force)
            settings: dict[str, Any] = {"private": private or None, "exist_ok": True}
            hub.api.create_repo(repo_id, repo_type="space", space_sdk="gradio", **settings)
        if console is not None:
            console.print(f"Sending the Space to {repo_id}")
        files = {path.name: path for path in sorted(folder.iterdir())}
        shown = f"Show {model.repo_id} at {model.commit[:8]}"
        commit = hub.commit(repo_id, files, message=shown, repo_type="space")
    return SpaceReport(repo_id, f"{hub.api.endpoint}/spaces/{repo_id}", commit)


def check_space(
    folder: Path,
    model: str,
    repo_id: str | None = None,
    *,
    private: bool = False,
    baseline: str | None = None,
    token: str | None = None,
    force: bool = False,
) -> str:
    """
    All that can be known to be wrong with a Space before its model is published.

    Args:
        folder (`Path`): Of the model.
        model (`str`): Where it will be.
        repo_id, private, baseline, token, force: As for [`publish_space`]. Without a token the Hub is not asked.

    Returns:
        `str`: The Space's id, with its owner if there is a token.

    Raises:
        ValueError: if the model has no tokenizer or no stock model computes it and no `baseline` is given, an id is
            none, the Space could not read a private model, is somebody's other one, or may not be written.
    """
    repo_id = repo_id or model
    check_repo_id(repo_id)
    if private:
        raise ValueError(
            "`private` is not for a model with a Space, which has no right to read it. Leave one of them out."
        )
    if not folder.is_dir():
        raise ValueError(f"`folder` must be the folder of a saved model, got {str(folder)!r}: no such folder.")
    measured = subject_of(folder)
    if measured.tokenizer is None:
        raise ValueError(
            "`space` needs a model with its tokenizer, got a folder without one. Save the tokenizer there, or leave "
            "`--space` out."
        )
    if baseline is None:
        exported(measured.model, model)
    with tempfile.TemporaryDirectory() as place:
        owned = model if "/" in model else f"owner/{model}"
        build_space(Path(place) / "space", repo_id=owned, model=owned, revision="0" * 40, baseline=baseline)
    if token is None:
        return repo_id
    hub = Hub(token)
    with hub.plain_errors(repo_id):
        repo_id = hub.with_owner(repo_id)
        _check_public(hub.api, hub.with_owner(model))
        _check_existing(hub.api, repo_id, force)
    return repo_id


def _check_public(api: HfApi, model: str) -> None:
    """A `ValueError` if the model's repository is there and private: its Space would be seen and not work."""
    try:
        private = api.model_info(model).private
    except RepositoryNotFoundError:
        return
    if private:
        raise ValueError(
            f"`space` needs a public model, as it may not read a private one, got the private {model!r}. Make it "
            "public in its settings on the Hub, or leave `--space` out."
        )


def _check_existing(api: HfApi, repo_id: str, force: bool) -> None:
    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        return
    names = {sibling.rfilename for sibling in info.siblings or ()} - {".gitattributes"}
    # Ours has settings of its own; an app without them is somebody's.
    if names and not names >= FILES and not force:
        raise ValueError(
            f"`space` must be new, or one of these Spaces to update, got {repo_id!r}, which holds "
            f"{sorted(names)[0]!r} and no settings of ours. Name another, or pass `force=True` to overwrite its app."
        )
