"""
Docstrings as mkdocstrings reads them, an extension of Griffe: references such as [`name`] become links where the site
has the name, and types of arguments lose the marks that Transformers' own documentation wants.
"""

import re
from typing import Any

from griffe import Extension, NameResolutionError


TYPE = re.compile(r"^(\s+\w+) \(`([^`]+)`((?:, [^()]*(?:\([^()]*\))?)?)\):", re.MULTILINE)
REFERENCE = re.compile(r"\[`([\w.]+)`\](?![(\[])")


class References(Extension):
    """Puts what autorefs understands in the place of each reference."""

    def on_package(self, *, pkg: Any, **kwargs: Any) -> None:
        self.walk(pkg)

    def walk(self, owner: Any) -> None:
        if owner.docstring:
            text = TYPE.sub(
                lambda match: f"{match[1]} ({match[2]}{re.sub('[`*]', '', match[3])}):", owner.docstring.value
            )
            owner.docstring.value = REFERENCE.sub(lambda match: link(owner, match[1]), text)
        for member in owner.members.values():
            if not member.is_alias:
                self.walk(member)


def link(owner: Any, name: str) -> str:
    """A link to a name as a docstring of `owner` knows it, if it leads somewhere."""
    try:
        path = name if name.startswith("rigpt_hf.") else owner.resolve(name)
    except NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
