"""The card of a repository: a person's own as it is, one of our making for these weights and this repository."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.read import quiet_loading
from ..evaluation.harness.cache import fingerprint
from ..evaluation.models import EvaluatedModel
from ..model_cards import card as cards
from ..model_cards.marker import digest_of_results, for_repository, is_unchanged, read_marker
from ..model_cards.metadata import AuthorMetadata, author_metadata, evaluation_of


PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


def card_of(
    folder: Path,
    measured: Callable[[], EvaluatedModel],
    *,
    repo_id: str | None = None,
    results: Path | None = None,
    card: Path | None = None,
    metadata: Path | AuthorMetadata | None = None,
    base: str | None = None,
) -> tuple[str, list[str]]:
    """
    The card of a model that is published.

    One of our making that nobody changed is written once more where the weights, the evaluation or the base are
    others, from what its author said then. Otherwise only the repository in it is put right.

    Args:
        folder (`Path`): Of the model.
        measured: Gives the model itself, which a card of a person does not ask for.
        repo_id, results, metadata: As for `rigpt_hf.model_cards.card.card_text`.
        card (`Path`, *optional*): The file; README.md of the folder if not given, or, if there is none, it is written.
        base (`str`, *optional*): Id on the Hub of the model that this one was made from.

    Returns:
        `tuple[str, list[str]]`: the text, and lines that say what people may not expect.

    Raises:
        ValueError: if there is no such file, its metadata are broken, it was written for other weights and changed
            since, a base is given for one that a person wrote or changed, or a card cannot be written.
    """
    text, path = own_card(folder, card, metadata), card or folder / cards.CARD
    said = metadata if base is None else based_on(base, path, text, metadata)
    if text is None:
        with quiet_loading():
            return cards.card_text(folder, repo_id=repo_id, results=results, metadata=said), []
    marker = read_marker(text)
    if marker is None:
        return text, [f"The card {path} is your own and stays as it is: the results are not in it."] if results else []
    stale, unchanged = marker.weights != fingerprint(measured()), is_unchanged(text, marker)
    if stale and not unchanged:
        raise ValueError(
            f"`card` must be of these weights, got {str(path)!r}, which rigpt card wrote for others and which was "
            "changed since. Remove it and write it once more with rigpt card, or remove its last line if all holds."
        )
    newer = results is not None and digest_of_results(evaluation_of(results, measured())[0]) != marker.results
    rebased = base is not None and base != marker.author_metadata.base_model
    if rebased and not stale and results is None and marker.results is not None:
        raise ValueError(
            f"`base` writes {str(path)!r} once more, got {base!r} without the evaluation whose numbers are in it. "
            "Pass its results.json too: rigpt publish has --results."
        )
    notes: list[str] = []
    if newer and not unchanged:
        notes.append(f"The card {path} was changed by hand and stays as it is: the results are not in it.")
    elif stale or newer or rebased:
        repo = repo_id or marker.repo
        with quiet_loading():
            text = cards.card_text(folder, repo_id=repo, results=results, metadata=said or marker.author_metadata)
        was = "other weights" if stale else "an earlier evaluation or none" if newer else "another base or none"
        notes.append(f"The card {path} was of {was}, so another is published; the file stays as it is.")
    return for_repository(text, repo_id) if repo_id else text, notes


def is_id(name: str) -> bool:
    """Whether there can be a repository of this name on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_base(base: str) -> None:
    """A `ValueError` if there can be no model of this name on the Hub."""
    if not is_id(base):
        raise ValueError(
            f"`base` must be the id of a model on the Hub such as me/my-rigpt, got {base!r}. Publish that model "
            "first, and name its repository."
        )


def based_on(base: str, path: Path, text: str | None, metadata: Path | AuthorMetadata | None) -> AuthorMetadata:
    """
    The metadata that people gave, with the model that this one was made from, for a card that is written.

    Args:
        base (`str`): Id of that model.
        path (`Path`), text (`str`, *optional*): The card that is there.
        metadata: As for [`card_of`]; those that a card of ours holds if there is one.

    Raises:
        ValueError: if there is a card that a person wrote or changed.
    """
    if text is None:
        said = metadata if isinstance(metadata, AuthorMetadata) else author_metadata(metadata)
        return replace(said, base_model=base)
    marker = read_marker(text)
    if marker is None or not is_unchanged(text, marker):
        raise ValueError(
            f"`base` is for a card that is written, got {base!r} although there is {str(path)!r}, which "
            f"{'a person wrote' if marker is None else 'was changed by hand'}. Name it there as base_model, or remove "
            "that card and write it once more: rigpt card has --metadata."
        )
    return replace(marker.author_metadata, base_model=base)


def own_card(folder: Path, card: Path | None = None, metadata: Path | AuthorMetadata | None = None) -> str | None:
    """
    The card that is there; `None` if one is to be written.

    Args:
        folder, card, metadata: As for [`card_of`].

    Raises:
        ValueError: if there is no such file, its header is broken, or there are metadata for another.
    """
    path = card or folder / cards.CARD
    if card is not None and not path.is_file():
        raise ValueError(f"`card` must be a Markdown file, got {str(card)!r}: no such file.")
    if not path.is_file():
        return None
    # A person's card keeps even the ends of its lines.
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"`card` must be text in UTF-8, got {str(path)!r}: {error}. Save it once more.") from error
    if metadata is not None:
        raise ValueError(
            f"`metadata` are for a card that is written, got {str(metadata)!r} although there is {str(path)!r}. Leave "
            "one of them out."
        )
    _check_metadata(path)
    return text


def _check_metadata(path: Path) -> None:
    """The Hub refuses a card with a broken header, which is better known before anything is sent."""
    try:
        ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"`card` must be Markdown with metadata in YAML between two lines of ---, got {str(path)!r}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def pictures_of(text: str, folder: Path) -> list[str]:
    """The pictures in the folder that the card shows."""
    pictures = [path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in PICTURES]
    names = sorted(path.relative_to(folder).as_posix() for path in pictures)
    return [name for name in names if re.search(rf"(?<![\w/.-])(\./)?{re.escape(name)}(?![\w.-])", text)]
