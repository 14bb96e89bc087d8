"""The last line of a generated card: a comment with the weights, the repository and the results it was written for."""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from rigpt_hf.text.markup import literal

from .metadata import AuthorMetadata, CardMetadata


# The source that a card without a repository names.
PLACEHOLDER = "FOLDER"
# The last such line: one that stands in a citation is a person's.
LINE = re.compile(r"^<!-- rigpt card (\{.*\}) -->\s*$(?![\s\S]*^<!-- rigpt card \{)", re.MULTILINE)
METADATA = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Marker:
    """
    The facts that a generated card holds about itself.

    Args:
        weights (`str`): SHA-256 of the model that it describes, as in the results of an evaluation.
        results (`str`, *optional*): SHA-256 of the evaluation whose numbers it repeats.
        repo (`str`, *optional*): Where it says that the model is; nowhere if not given.
        title (`str`): Of the card.
        author (`dict`): What a person said, as in [`AuthorMetadata`], to write it once more.
        text (`str`): SHA-256 of the rest of the card, which tells whether somebody changed it since.
    """

    weights: str
    results: str | None
    repo: str | None
    title: str
    author: dict[str, Any]
    text: str = ""

    @property
    def author_metadata(self) -> AuthorMetadata:
        """The metadata that a person gave when the card was written."""
        return AuthorMetadata(**self.author)


def marker_of(known: CardMetadata, title: str, repo_id: str | None) -> Marker:
    """The marker of a card of what is known, before its text is known."""
    said = {name: value for name, value in asdict(known.author).items() if value}
    return Marker(known.fingerprint, digest_of_results(known.evaluation), repo_id, title, said)


def signed(text: str, marker: Marker) -> str:
    """A card with its marker as the last line."""
    return _with_line(text, replace(marker, text=digest_of_text(text)))


def _with_line(text: str, marker: Marker) -> str:
    # No end of a comment may stand in what people wrote.
    line = json.dumps(asdict(marker)).replace(">", "\\u003e")
    return f"{text.rstrip()}\n\n<!-- rigpt card {line} -->\n"


def read_marker(text: str) -> Marker | None:
    """
    The marker of a card; `None` if a person wrote the card.

    Raises:
        ValueError: if there is one that cannot be read.
    """
    line = LINE.search(text)
    if line is None:
        return None
    try:
        marker = Marker(**json.loads(line[1]))
        marker.author_metadata  # noqa: B018  it must be readable too
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`card` must end with the comment of rigpt card as it was written, got {line[1]:.60}. Remove the "
            "card and write it once more with rigpt card, or remove that line to keep the card as your own."
        ) from error
    return marker


def without_marker(text: str) -> str:
    """A card as a reader sees it."""
    return LINE.sub("", text).rstrip() + "\n"


def is_unchanged(text: str, marker: Marker) -> bool:
    """Whether nobody changed a card since it was written; how its metadata are laid out does not count."""
    return digest_of_text(without_marker(text)) == marker.text


def digest_of_text(text: str) -> str:
    """SHA-256 of a card without its marker. Of metadata only values count: who adds a tag lays them out anew."""
    head = METADATA.match(text)
    values: Any = head[1] if head else None
    with suppress(yaml.YAMLError, RecursionError):
        values = yaml.safe_load(head[1]) if head else None
    body = text[head.end() if head else 0 :].replace("\r\n", "\n").strip()
    return _sha256([values, body], default=str)


def digest_of_results(evaluation: dict[str, Any] | None) -> str | None:
    """SHA-256 of an evaluation; `None` if there is none."""
    return None if evaluation is None else _sha256(evaluation)


def _sha256(content: Any, **options: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, **options).encode()).hexdigest()


def title_of(author: AuthorMetadata, repo_id: str | None) -> str:
    """The title of a model: its author's, or the name of its repository."""
    return author.title or (repo_id.partition("/")[2] or repo_id if repo_id else "RiGPT")


def for_repository(text: str, repo_id: str) -> str:
    """
    A generated card that loads the model from `repo_id`, and is called so where it had its name from a repository.

    It is not rendered again: its numbers may come from results that are not at hand, and what a person changed in it
    stays as it is. Cards without a marker come back as they are.
    """
    marker = read_marker(text)
    if marker is None or marker.repo == repo_id:
        return text
    renamed, unchanged = without_marker(text), is_unchanged(text, marker)
    fitted = replace(marker, repo=repo_id, title=title_of(marker.author_metadata, repo_id))
    for before, after in (('from_pretrained("', '"'), ('from_pretrained(model, "', '"'), ("llama-cli -hf ", "\n")):
        renamed = renamed.replace(f"{before}{marker.repo or PLACEHOLDER}{after}", f"{before}{repo_id}{after}")
    for old, new in zip(_lines_with(marker.title), _lines_with(fitted.title), strict=True):
        renamed = renamed.replace(old, new, 1)
    return signed(renamed, fitted) if unchanged else _with_line(renamed, fitted)


def _lines_with(title: str) -> list[str]:
    """The lines of a card that name the model: the heading, and in the metadata as YAML writes them."""
    dumped = (yaml.safe_dump(named) for named in ({"model_name": title}, [{"name": title}]))
    return [f"\n{line}" for line in (f"# {literal(title)}\n", *dumped)]
