"""A Gradio Space in which one turns the hidden space of a RiGPT and of a stock model by an angle."""

import json
import re
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from huggingface_hub import SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..conversion.output import publish, temporary_sibling
from ..version import __version__


TITLE = "RiGPT: a GPT with no preferred basis"
PROMPT = "The capital of France is"
APP = Path(__file__).with_name("space_app")
GRADIO = "6.31.0"  # that the app was driven with
PYTHON = "3.11"  # the least that the package runs on, and more than Spaces have by default
# What decides numbers and pictures; the versions in use where the Space is built.
PINNED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "scipy", "matplotlib")
FILES = frozenset({"README.md", "app.py", "requirements.txt", "settings.json"})
REVISION = re.compile(r"[\w][\w./-]*")


def build_space(
    output: Path,
    *,
    repo_id: str,
    model: str,
    revision: str | None = None,
    baseline: str | None = None,
    title: str = TITLE,
    prompt: str = PROMPT,
    force: bool = False,
) -> Path:
    """
    Write the folder of a Space that shows a RiGPT while its hidden space turns; it appears complete or not at all.

    Args:
        output: The folder; `app.py`, `README.md` with the metadata of the Space, `requirements.txt`, `settings.json`.
        repo_id: The model on the Hub that the Space belongs to, for its metadata.
        model: Hub id that the app loads; `repo_id` as a rule. It needs its tokenizer beside it.
        revision (`str`, *optional*): Branch, tag or, best, commit of `model`; what is newest if not given.
        baseline (`str`, *optional*): Hub id of the stock model shown beside it, the one that the RiGPT was made from
            or one with the same tokenizer. If not given, the app exports the RiGPT to a stock model.
        title: Of the page and of the Space.
        prompt: What stands in the text box at first.
        force: Whether an earlier Space in `output` may be replaced.

    Returns:
        `output`.

    Raises:
        ValueError: if an id, `revision`, `title` or `prompt` cannot be, or `output` may not be written.
    """
    output = Path(output)
    for argument, value in (("repo_id", repo_id), ("model", model), ("baseline", baseline)):
        check_repo_id(value, argument)
    if revision is not None and not REVISION.fullmatch(revision):
        raise ValueError(f"`revision` must be a branch, tag or commit, got {revision!r}. Give the commit to be sure.")
    for argument, value in (("title", title), ("prompt", prompt)):
        if not value.strip() or len(value.splitlines()) > 1:
            raise ValueError(f"`{argument}` must be one line with something in it, got {value!r}.")
    check_space(output, force)
    temporary = temporary_sibling(output)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"`output` must be a place that can be written to, got {str(output)!r}: {error.strerror}. Name another."
        ) from error
    settings = {
        "title": title,
        "prompt": prompt,
        "model": model,
        "revision": revision,
        "baseline": baseline,
        "sources": sources(model, revision, baseline),
    }
    try:
        shutil.copyfile(APP / "app.py", temporary / "app.py")
        (temporary / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (temporary / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(readme(repo_id, settings), encoding="utf-8")
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output


def requirements() -> list[str]:
    """Lines of `requirements.txt`, every one pinned. Gradio itself comes with the Space, from `sdk_version`."""
    lines = [f"rigpt-hf=={__version__}"]
    for name in PINNED:
        with suppress(PackageNotFoundError):
            # Without a label such as +cpu, which only some indexes have.
            lines.append(f"{name}=={version(name).partition('+')[0]}")
    return lines


def readme(repo_id: str, settings: dict) -> str:
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
        models=list(dict.fromkeys([repo_id, *([baseline] if baseline else [])])),
        tags=["rigpt", "rotation-invariance"],
        short_description="Turn a GPT's hidden space: nothing changes",
    )
    body = Template((APP / "README.md").read_text(encoding="utf-8")).substitute(
        title=settings["title"], sources=settings["sources"], gradio=GRADIO
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


def check_repo_id(value: str | None, argument: str):
    """A `ValueError` if this cannot be the id of a repository on the Hub. None is fine."""
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(
            f"`{argument}` must be the id of a model on the Hub such as `someone/rigpt`, got {value!r}. A Space "
            "cannot read folders of this machine; upload the model first."
        ) from error


def check_space(output: Path, force: bool):
    """A `ValueError` if the folder of a Space may not be written."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, got the file {str(output)!r}. Name another one.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not {path.name for path in output.iterdir()} <= FILES:
        raise ValueError(
            f"`output` must be absent, empty or an earlier Space and nothing else, got {str(output)!r}. Name another "
            "folder."
        )
    if not force:
        raise ValueError(
            f"`output` holds a Space already, got {str(output)!r}. Name another folder, or pass `force=True` to "
            "replace it once the new one is complete."
        )
