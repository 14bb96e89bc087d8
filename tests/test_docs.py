"""The documentation names code that exists."""

import importlib
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_reference_to_code_leads_somewhere(page):
    references = re.findall(r"`(?:rigpt_hf/symmetry/)?(\w+)\.py::([\w.]+)`", page.read_text(encoding="utf-8"))
    assert len(references) > 10, "the page refers to no code"
    for module, path in references:
        place = importlib.import_module(f"rigpt_hf.symmetry.{module}")
        for name in path.split("."):
            place = getattr(place, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_named_exists(page):
    names = set(re.findall(r"`(?:tests/symmetry/)?(test_\w+\.py)`", page.read_text(encoding="utf-8")))
    assert names
    missing = {name for name in names if not (ROOT / "tests" / "symmetry" / name).is_file()}
    assert not missing, f"the page names tests that do not exist: {missing}"
