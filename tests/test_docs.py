"""The documentation names code that exists."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rigpt_hf.training.options import parse_options
from tests.conversion.sources import stock_model


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


def test_the_blocks_of_the_readme_run_as_pasted(monkeypatch, capsys):
    """One after the other, with a small GPT-2 in the place of the one that must be fetched."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: stock_model("gpt2", torch.float32))
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 2 and "equal up to rounding" in capsys.readouterr().out
    assert namespace["gauge_error"](namespace["model"], namespace["g"], namespace["input_ids"]) < 1e-5
    assert namespace["compare"](namespace["model"], namespace["turned"]).verdict == "disguise"
