"""The one escape of texts that somebody else wrote, in Markdown and in HTML: they are read as they were written."""

import re

from ..terminal import UNSEEN


# Means something in Markdown or HTML, but for words between two backticks, which are code, and underscores in words.
# The rest does only where a line begins.
CODE = r"(?<!`)(`(?![` ])[^`<>&|\\]+(?<! )`)(?!`)"
MARKUP = re.compile(CODE + r"|[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|^ ?(?:#|=|-(?=[- ]*$))")


def literal(value: object) -> str:
    """
    A value as text for a line or cell of Markdown, or for the content of an HTML element, in which it stays one line.

    Character references are no markup in either: `<b>` becomes `&#60;b&#62;`. Words between backticks stay code.
    """
    line = UNSEEN.sub("", re.sub(r"\s+", " ", str(value)))
    return MARKUP.sub(lambda match: match[1] or f"{match[0][:-1]}&#{ord(match[0][-1])};", line)


def literal_lines(text: str) -> str:
    """A text of several lines as Markdown, of which paragraphs and simple lists stay."""
    return "\n".join(literal(line.strip()) for line in text.splitlines())
