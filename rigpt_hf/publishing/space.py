"""A Gradio Space in which one turns the hidden space of a published RiGPT and of a stock model by an angle."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..conversion.checkpoint import CONVERSION
from ..terminal import notices_held
from ..text.markup import literal
from ..version import package
from .hub import Hub
from .notebook import PROMPT
from .repository import check_there, model_of
from .rotation_view import exported
from .upload import PublishedReport, check_repo_id


TITLE = "RiGPT: a GPT with no preferred basis"
APP = Path(__file__).with_name("space_app")
GRADIO = "6.31.0"  # that the app was driven with
PYTHON = "3.11"  # the least that the package runs on, and more than Spaces have by default
# Packages that decide numbers and pictures, pinned to the versions in use where the Space is built.
PINNED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "scipy", "matplotlib")
FILES = frozenset({"README.md", "app.py", "requirements.txt", "settings.json"})
REVISION = re.compile(r"[\w][\w./-]*")


@dataclass(frozen=True)
class SpaceReport:
    """
    A published Space.

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
    Put a Space on the Hub in which people turn a published RiGPT and a stock model by an angle, in one commit.

    Args:
        model (`PublishedReport`): What [`publish`] returned; the Space loads just this commit.
        repo_id (`str`, *optional*): Of the Space; that of the model if not given, as the two do not get in each
            other's way.
        private (`bool`, defaults to `False`): Make a new Space private.
        baseline (`str`, *optional*), title (`str`): As for [`space_files`].
        token (`str`, *optional*): As for [`publish`].
        force (`bool`, defaults to `False`): Whether another kind of Space may be overwritten.
        console (`rich.console.Console`, *optional*): To say what is being done.

    Raises:
        ValueError: if the model has no tokenizer or its repository is private, the Space is somebody's other one, or
            the Hub refuses.
    """
    repo_id = repo_id or model.repo_id
    hub = Hub(token)
    files = space_files(model.repo_id, revision=model.commit, baseline=baseline, title=title)
    with hub.plain_errors(repo_id):
        # An organization may make new repositories private by itself.
        _check_public(hub.api, model.repo_id)
        _check_existing(hub.api, repo_id, force)
        settings: dict[str, Any] = {"private": private or None, "exist_ok": True}
        hub.api.create_repo(repo_id, repo_type="space", space_sdk="gradio", **settings)
    if console is not None:
        console.print(f"Sending the Space to {repo_id}")
    message = f"Show {model.repo_id} at {model.commit[:8]}"
    commit = hub.commit(repo_id, files, message=message, repo_type="space")
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
    check_there(folder)
    measured = model_of(folder)
    if measured.tokenizer is None:
        raise ValueError(
            "`space` needs a model with its tokenizer, got a folder without one. Save the tokenizer there, or leave "
            "`--space` out."
        )
    if baseline is None:
        with notices_held(CONVERSION):  # nobody keeps what is only tried
            exported(measured.model, model)
    space_files(model, baseline=baseline)
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


def space_files(
    model: str,
    *,
    revision: str | None = None,
    baseline: str | None = None,
    title: str = TITLE,
    prompt: str = PROMPT,
) -> dict[str, bytes]:
    """
    The files of a Space that shows a RiGPT while its hidden space turns.

    Args:
        model: Hub id of the RiGPT. It needs its tokenizer beside it.
        revision (`str`, *optional*): Branch, tag or, best, commit of `model`; what is newest if not given.
        baseline (`str`, *optional*): Hub id of the stock model shown beside it, the one that the RiGPT was made from
            or one with the same tokenizer. If not given, the app exports the RiGPT to a stock model.
        title: Of the page and of the Space.
        prompt: What stands in the text box at first.

    Returns:
        `app.py`, `README.md` with the metadata of the Space, `requirements.txt` and `settings.json`, by name.

    Raises:
        ValueError: if an id, `revision`, `title` or `prompt` cannot be.
    """
    for argument, value in (("model", model), ("baseline", baseline)):
        try:
            validate_repo_id(value)  # None is fine
        except HFValidationError as error:
            raise ValueError(
                f"`{argument}` must be the id of a model on the Hub such as `someone/rigpt`, got {value!r}. A Space "
                "cannot read folders of this machine; upload the model first."
            ) from error
    if revision is not None and not REVISION.fullmatch(revision):
        raise ValueError(f"`revision` must be a branch, tag or commit, got {revision!r}. Give the commit to be sure.")
    for argument, value in (("title", title), ("prompt", prompt)):
        if not value.strip() or len(value.splitlines()) > 1:
            raise ValueError(f"`{argument}` must be one line with something in it, got {value!r}.")
    settings = {"title": title, "prompt": prompt, "model": model, "revision": revision, "baseline": baseline}
    settings["sources"] = sources(model, revision, baseline)
    texts = {
        "README.md": readme(settings),
        "requirements.txt": "\n".join(requirements()) + "\n",
        "settings.json": json.dumps(settings, indent=2) + "\n",
    }
    return {"app.py": (APP / "app.py").read_bytes()} | {name: text.encode() for name, text in texts.items()}


def requirements() -> list[str]:
    """Lines of `requirements.txt`, every one pinned. Gradio itself comes with the Space, from `sdk_version`."""
    lines = [package()]
    for name in PINNED:
        with suppress(PackageNotFoundError):
            # Without a label such as +cpu, which only some indexes have.
            lines.append(f"{name}=={version(name).partition('+')[0]}")
    return lines


def readme(settings: dict) -> str:
    """The page of the Space with its metadata."""
    baseline = settings["baseline"]
    data = SpaceCardData(
        title=settings["title"],
        emoji="🧭",
        colorFrom="blue",
        colorTo="red",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        license="apache-2.0",
        models=list(dict.fromkeys([settings["model"], *([baseline] if baseline else [])])),
        tags=["rigpt", "rotation-invariance"],
        short_description="Turn a GPT's hidden space: nothing changes",
    )
    body = Template((APP / "README.md").read_text(encoding="utf-8")).substitute(
        title=literal(settings["title"]), sources=settings["sources"], gradio=GRADIO
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def sources(model: str, revision: str | None, baseline: str | None) -> str:
    """One paragraph of Markdown that says which models are shown."""
    at = f" at `{revision}`" if revision else ""
    beside = (
        f"[{baseline}](https://huggingface.co/{baseline})"
        if baseline
        else "the export of the same weights to a stock model, with gains of 1 in the norms inside its layers"
    )
    return f"RiGPT: [{model}](https://huggingface.co/{model}){at}. Stock model: {beside}."
