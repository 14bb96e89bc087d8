"""References such as [`name`] in docstrings, as links where the site has the name: an extension of Griffe."""

import re
from typing import Any

from griffe import Extension, NameResolutionError


REFERENCE = re.compile(r"\[`([\w.]+)`\](?![(\[])")


class References(Extension):
    """Puts what autorefs understands in the place of each reference."""

    def on_package(self, *, pkg: Any, **kwargs: Any) -> None:
        self.walk(pkg)

    def walk(self, owner: Any) -> None:
        if owner.docstring:
            owner.docstring.value = REFERENCE.sub(lambda match: link(owner, match[1]), owner.docstring.value)
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
