"""A page of the API for every package that programs import, for mkdocstrings to fill from the docstrings."""

import ast
import tomllib
from pathlib import Path

from links import ROOT


# What is used by its verb alone, by a notebook, or inside of another engine.
NOT_IMPORTED = ("cli", "course", "demo", "training.engines")
# A package whose public names stand in a module beside it.
STABLE = {"rigpt_hf.optimizer": "rigpt_hf.optim"}


def places() -> dict[str, Path]:
    """The folder of every package, by the name that it is imported by."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    return {name: ROOT / setup["package-dir"].get(name, name.replace(".", "/")) for name in setup["packages"]}


def laid_out(target: Path) -> Path:
    """The packages laid out as they are installed, by links, for tools that read source."""
    inner = target / "rigpt_hf"
    inner.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "rigpt_hf").iterdir() if path.name != "__pycache__"}
    wanted |= {name.split(".")[1]: path for name, path in places().items() if name.count(".") == 1}
    for link in inner.iterdir():
        link.unlink()
    for name, path in wanted.items():
        (inner / name).symlink_to(path)
    return target


def api_pages() -> dict[str, str]:
    """The Markdown of the pages, by where they are on the site."""
    pages = {}
    for name, path in places().items():
        if name.removeprefix("rigpt_hf.") in NOT_IMPORTED:
            continue
        public = STABLE.get(name, name)
        pages[f"api/{public}.md"] = (
            f"---\nsearch:\n  boost: 0.1\n---\n\n# {public}\n\n" + "\n\n".join(members(public, path)) + "\n"
        )
    return pages


def members(name: str, path: Path) -> list[str]:
    """Directives for mkdocstrings: the names that a package exports, or else all that its modules have."""
    if name in STABLE.values() or "__all__" in (path / "__init__.py").read_text(encoding="utf-8"):
        return [f"::: {name}"]
    modules = sorted(file.stem for file in path.glob("*.py") if not file.name.startswith("_") and has_public(file))
    opening = f"::: {name}\n    options:\n      members: false"
    inner = [f"## {module}\n\n::: {name}.{module}\n    options:\n      heading_level: 3" for module in modules]
    return [opening, *inner]


def has_public(file: Path) -> bool:
    """Whether a module has a documented function or class without a leading underscore."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(one, kinds) and one.name[0] != "_" and ast.get_docstring(one) for one in body)
