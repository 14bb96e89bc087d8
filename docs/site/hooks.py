"""The site as MkDocs builds it: pages that are generated, links for the site, formulas without a script."""

import html
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from api import api_pages, laid_out
from course import course_pages
from links import FRONT, ROOT, origin, rewritten
from refusals import troubleshooting
from verbs import verb_pages


# What latex2mathml does not know, as what it does.
SPELLED = ((r"\{aligned\}", "{align*}"), (r"\\[bB]igg?(?=\\[lr]angle)", ""), (r"\\mathrel\{(.)\}", r"\1"))
BROKEN = re.compile(r"<m\w+[^>]*>(?:[^<]*\\[^<]*|&|&amp;|&#x00026;)</m")
# Letters of a style that browsers do not draw by themselves, as in MathML Core.
STYLED = re.compile(r'<(m[in]) mathvariant="(bold|fraktur|double-struck)">(\w|&#x\w+;)</\1>')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def generated() -> dict[str, str | bytes]:
    """All pages and pictures that no file of `docs` is by itself, by where they are on the site."""
    front = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in FRONT.items()}
    config = "# RiGPTConfig\n\n::: rigpt_hf.configuration_rigpt.RiGPTConfig\n    options:\n      members: false\n"
    front["changelog.md"] = f"---\nsearch:\n  exclude: true\n---\n\n{front['changelog.md']}"
    pages: dict[str, str | bytes] = {"configuration.md": config, "troubleshooting.md": troubleshooting()}
    return pages | front | verb_pages() | api_pages() | course_pages()


def every_page(made: Mapping[str, str | bytes]) -> list[str]:
    """Where all pages are on the site, written and generated."""
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    return sorted(written | {page for page in made if page.endswith(".md")})


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """A navigation in which a pattern such as `verbs/*.md` stands for the pages of a folder that are not named."""
    named = walked(nav)

    def expand(items: list[Any]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, dict):
                yield {name: [*expand(inner)] if isinstance(inner, list) else inner for name, inner in item.items()}
            elif "*" in item:
                folder = posixpath.dirname(item)
                yield from (page for page in pages if posixpath.dirname(page) == folder and page not in named)
            else:
                yield item

    return [*expand(nav)]


def walked(item: Any) -> list[str]:
    """Every page in a part of a navigation."""
    if isinstance(item, str):
        return [item]
    return [page for value in (item.values() if isinstance(item, dict) else item) for page in walked(value)]


def on_startup(command: str, dirty: bool) -> None:
    """Lay the packages out before mkdocstrings looks for them, which it does as soon as it is set up."""
    laid_out(ROOT / "build/site-packages")


def on_config(config: Any) -> Any:
    """Generate the pages, and write those that a folder stands for into the navigation."""
    config.extra["generated"] = pages = generated()
    config.nav = expanded(config.nav, every_page(pages))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what is generated to what lies in `docs`."""
    from mkdocs.structure.files import File

    for uri, content in config.extra["generated"].items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page from the repository as they must be here."""
    file = origin(page.file.src_uri)
    return rewritten(markdown, file, config.extra.get("repository")) if file else markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves; the build ends at one that would not be drawn."""
    if "arithmatex" not in content:
        return content
    from latex2mathml.converter import convert
    from mkdocs.exceptions import PluginError

    def drawn(match: re.Match) -> str:
        formula = html.unescape(match[3]).strip()
        for theirs, known in SPELLED:
            formula = re.sub(theirs, known, formula)
        made = convert(formula, display="inline" if match[2] == "(" else "block")
        if BROKEN.search(made):
            raise PluginError(f"{page.file.src_uri}: latex2mathml does not know all of {formula}")
        return STYLED.sub(styled, made)

    return FORMULA.sub(drawn, content)


def styled(match: re.Match) -> str:
    """A letter or digit in bold, fraktur or double-struck as the character that Unicode has for it."""
    name = (
        unicodedata.name(html.unescape(match[3])).removeprefix("LATIN ").removeprefix("GREEK ").replace(" LETTER", "")
    )
    style = match[2].upper()
    # Some capitals were there before the others, under a name of their own.
    for full in (f"MATHEMATICAL {style} {name}", f"{style} {name}", f"BLACK-LETTER {name}"):
        try:
            return f"<mi>{unicodedata.lookup(full)}</mi>"
        except KeyError:
            continue
    return match[0]
