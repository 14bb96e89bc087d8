"""The chapters of the course as pages, with the outputs that their notebooks hold."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from links import ROOT


def course_pages() -> dict[str, str | bytes]:
    """The Markdown of each chapter, and its pictures, by where they are on the site."""
    pages: dict[str, str | bytes] = {}
    for notebook in sorted((ROOT / "docs/course").glob("*.ipynb")):
        pages |= page(notebook.stem, json.loads(notebook.read_text(encoding="utf-8")))
    return pages


def joined(text: Any) -> str:
    return text if isinstance(text, str) else "".join(text)


def page(name: str, notebook: Any) -> dict[str, str | bytes]:
    """The Markdown of a notebook and its pictures, by where they are on the site."""
    lines: list[str] = []
    pictures: dict[str, str | bytes] = {}
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source.replace("<details>", '<details markdown="1">'), ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"course/{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(joined(data["image/png"]))
                lines += [f"![Figure {len(pictures)} of this chapter]({Path(picture).name})", ""]
            elif said := joined(output.get("text") or data.get("text/plain", "")):
                lines += ["```text", re.sub(r"\x1b\[[0-9;]*m", "", said).rstrip("\n"), "```", ""]
    return {f"course/{name}.md": "\n".join(lines)} | pictures
