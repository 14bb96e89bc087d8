"""The documentation names code that exists."""

import importlib
import re
from pathlib import Path

import pytest

from rigpt_hf.training.options import parse_options


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_reference_to_code_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    references = re.findall(r"`(?:rigpt_hf/(symmetry|flow)/)?(\w+)\.py::([\w.]+)`", text)
    for package, module, path in references:
        place = importlib.import_module(f"rigpt_hf.{package or 'symmetry'}.{module}")
        for name in path.split("."):
            place = getattr(place, name)
    paths = set(re.findall(r"(?:training|evaluation|tests|docs|rigpt_hf)/[\w/.-]+\w", text))
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing, f"the page names files that do not exist: {missing}"
    assert len(references) + len(paths) > 5, "the page refers to no code"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_named_exists(page):
    names = set(re.findall(r"\b(test_\w+\.py)", page.read_text(encoding="utf-8")))
    assert names
    missing = {name for name in names if not list((ROOT / "tests").rglob(name))}
    assert not missing, f"the page names tests that do not exist: {missing}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_pretraining_line_is_understood(page):
    """Presets that exist, and options that the program takes."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"training/pretrain\.py( --config [^#\n`]*)", text)
    assert lines or page.name in ("symmetry.md", "evaluation.md", "flow.md")
    for line in lines:
        options = parse_options([word.replace("training/", f"{ROOT}/training/") for word in line.split()])
        assert options.max_steps >= 100
