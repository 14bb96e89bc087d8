"""
Links of a file of the repository, as they must be on the site.

Pages are written for where they lie in the repository, and are not changed for the site: what leads to a page leads
to it there, too, under its title; what leads to any other file leads to the repository's address, or is plain text
where none is known.
"""

import posixpath
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# Files beside `docs` that are pages, and where: MkDocs sees no others than those in `docs`.
FRONT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
MENTION = re.compile(r"(?<![\[`\w])`(docs/[\w/-]+\.md)`(?![\]`])")


def title(file: str) -> str:
    """The title of a page, by its path in the repository."""
    first = re.search(r"^# (.+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return first[1] if first else Path(file).stem


def uri(file: str) -> str | None:
    """Where a file of the repository is on the site, as Markdown; `None` if it is not there."""
    if file in FRONT:
        return FRONT[file]
    if not file.startswith("docs/") or file.endswith(".py") or not (ROOT / file).is_file():
        return None
    return re.sub(r"\.ipynb$", ".md", file.removeprefix("docs/"))


def origin(page: str) -> str | None:
    """The file of the repository that a page of the site is made from; `None` if from none alone."""
    beside = next((file for file, at in FRONT.items() if at == page), None)
    kept = (f"docs/{page}", f"docs/{page.removesuffix('.md')}.ipynb")
    return beside or next((file for file in kept if (ROOT / file).is_file()), None)


def rewritten(text: str, file: str, repository: str | None = None) -> str:
    """
    Markdown of a file with links for the site.

    Args:
        text: The Markdown; code blocks stay.
        file: Its path in the repository.
        repository: The address under which files of the repository are read, up to the name of the branch.
    """
    page = uri(file)
    assert page is not None, f"{file} is not on the site"

    def to(place: str) -> str:
        return posixpath.relpath(place, posixpath.dirname(page) or ".")

    def link(match: re.Match) -> str:
        image, label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if repository:  # a picture that an index page shows, too
            path = path.removeprefix(f"{repository.replace('/blob/', '/raw/')}/")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        found = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        place = uri(found)
        if place is not None:
            named = title(found) if label.strip("`") == found and place.endswith(".md") else label
            return f"{image}[{named}]({to(place)}{hash_}{anchor})"
        if not (ROOT / found).exists():
            return match[0]  # which a strict build refuses
        return f"[{label}]({repository}/{found})" if repository else label

    def mention(match: re.Match) -> str:
        place = uri(match[1])
        return match[0] if place in (None, page) else f"[{title(match[1])}]({to(str(place))})"

    parts = FENCE.split(text)
    return "".join(
        part if index % 2 else MENTION.sub(mention, LINK.sub(link, part)) for index, part in enumerate(parts)
    )
