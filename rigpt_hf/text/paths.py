"""Texts without the folders of the machine that they were written on."""

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# How the path of a machine begins; a relative one without dots looks like an id on the Hub.
ROOT = r"""(?:file:/|[A-Za-z]:[/\\]|~[^\s/\\'"`]*[/\\]|\.{0,2}[/\\])"""
# Such a path as far as the quotation mark that ends it; an apostrophe within a word ends nothing.
QUOTED = re.compile(rf"""(?<!\w)(['"`])({ROOT}[^\s'"`][^\n]{{,4096}}?)\1(?!\w)""")
# Everything up to the last part of a path that a text begins with; folders may have spaces in their names.
FOLDERS = re.compile(r"(?:file://)?(?:[A-Za-z]:)?(?:~[\w.-]*|\.{1,2})?[/\\](?:[^(\n]*[/\\])?(?=[^\s/\\])")
# An address on a network, or anything else with a slash in it. No letter is looked at from many places before it.
ADDRESS_OR_PATH = re.compile(
    r"(\b(?!file:)[a-zA-Z][\w+.-]{1,40}://[^\s/]\S*)"
    r"|(?:\b[A-Za-z]:|file:/|(?<![\w.~+-]))[\w.~+-]*+[/\\][\w.~+/\\-]*"
)


def without_path(text: str) -> str:
    """
    A text in which paths of a machine are their last part: where things lay is nobody's business.

    Addresses stay, and so do ids on the Hub, and with them relative paths of just two parts, which look the same. A
    folder with a space in its name is known as such where the path is in quotation marks or begins the text.
    """

    def last_part(match: re.Match) -> str:
        found = match[0]
        return found if match[1] or _is_id(found) else _last_part(found)

    text = QUOTED.sub(lambda match: f"{match[1]}{_last_part(match[2])}{match[1]}", text)
    return ADDRESS_OR_PATH.sub(last_part, FOLDERS.sub("", text, count=1) if FOLDERS.match(text) else text)


def _last_part(path: str) -> str:
    """The path itself if it is nothing but dots and slashes."""
    return next((part for part in reversed(re.split(r"[/\\]+", path)) if part.strip(".")), path)


def _is_id(text: str) -> bool:
    """Whether this can be the id of a repository with its owner."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return all(part.strip(".") for part in text.split("/"))
