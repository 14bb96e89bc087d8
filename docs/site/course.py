"""The chapters of the course as pages, with the outputs of a run."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from links import ROOT


def chapters() -> list[Path]:
    """The notebooks, in their order."""
    return sorted((ROOT / "docs/course").glob("*.ipynb"))


def course_pages(outputs: Path | None) -> dict[str, str | bytes]:
    """
    The Markdown of each chapter, and its pictures, by where they are on the site.

    Args:
        outputs: Folder in which chapters that were run are kept, until they or the package change. `None`: chapters
            are shown without having been run.
    """
    pages: dict[str, str | bytes] = {}
    for notebook in chapters():
        pages |= page(notebook.stem, read(notebook) if outputs is None else run(notebook, outputs))
    return pages


def read(notebook: Path) -> Any:
    """A notebook as dicts and lists."""
    import json

    return json.loads(notebook.read_text(encoding="utf-8"))


def run(notebook: Path, outputs: Path) -> Any:
    """
    A notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a claim of the chapter does not hold.
    """
    sources = [notebook, *sorted((ROOT / "rigpt_hf").rglob("*.py"))]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sources)).hexdigest()
    kept = outputs / f"{notebook.stem}-{digest[:16]}.ipynb"
    if not kept.is_file():
        import nbformat
        from nbclient import NotebookClient

        made = nbformat.read(notebook, 4)
        NotebookClient(made, timeout=900, resources={"metadata": {"path": str(notebook.parent)}}).execute()
        outputs.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        nbformat.write(made, part)
        part.replace(kept)
    return read(kept)


def joined(text: Any) -> str:
    return text if isinstance(text, str) else "".join(text)


def page(name: str, notebook: Any) -> dict[str, str | bytes]:
    """The Markdown of a notebook and its pictures, by where they are on the site."""
    lines: list[str] = []
    pictures: dict[str, str | bytes] = {}
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
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
