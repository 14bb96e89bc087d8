"""The site as MkDocs builds it: pages that are generated, links for the site, formulas without a script."""

import html
import re
from typing import Any

from api import api_pages, laid_out
from course import course_pages
from links import FRONT, ROOT, origin, rewritten
from refusals import troubleshooting
from verbs import verb_pages


FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def generated() -> dict[str, str | bytes]:
    """All pages and pictures that no file of `docs` is by itself, by where they are on the site."""
    front = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in FRONT.items()}
    config = "# RiGPTConfig\n\n::: rigpt_hf.configuration_rigpt.RiGPTConfig\n    options:\n      members: false\n"
    pages: dict[str, str | bytes] = {"configuration.md": config, "troubleshooting.md": troubleshooting()}
    return pages | front | verb_pages() | api_pages() | course_pages()


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """A navigation in which a folder, such as `verbs/`, stands for the pages in it that are not named elsewhere."""
    named = {value for item in nav for value in walked(item)}

    def inside(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: expand(value) if isinstance(value, list) else value for name, value in item.items()}
        return item

    def expand(items: list[Any]) -> list[Any]:
        out: list[Any] = []
        for item in items:
            if isinstance(item, str) and item.endswith("/"):
                out += [page for page in pages if page.startswith(item) and page not in named]
            else:
                out.append(inside(item))
        return out

    return expand(nav)


def walked(item: Any) -> list[str]:
    """Every page in a part of a navigation."""
    if isinstance(item, str):
        return [item]
    return [page for value in (item.values() if isinstance(item, dict) else item) for page in walked(value)]


def on_config(config: Any) -> Any:
    """Generate the pages, and write those that a folder stands for into the navigation."""
    laid_out(ROOT / "build/site-packages")
    config.extra["generated"] = pages = generated()
    config.nav = expanded(config.nav, [page for page in pages if page.endswith(".md")])
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
    """Formulas as MathML, which browsers draw by themselves."""
    if "arithmatex" not in content:
        return content
    from latex2mathml.converter import convert

    def drawn(match: re.Match) -> str:
        return convert(html.unescape(match[3]).strip(), display="inline" if match[2] == "(" else "block")

    return FORMULA.sub(drawn, content)
