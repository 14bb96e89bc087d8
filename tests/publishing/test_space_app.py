"""What the app of a Space says about the models that it shows, without a browser, Gradio and weights."""

import runpy
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from rigpt_hf.publishing import rotation_view
from rigpt_hf.publishing.space import space_files


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Makes a Space, runs its app, and gives the Markdown on the page and what was loaded."""

    def run(baseline: str | None, environment: dict[str, str]) -> tuple[str, dict]:
        for file, content in space_files("me/rigpt", revision="0123abc", baseline=baseline).items():
            (tmp_path / file).write_bytes(content)
        gradio, loaded = MagicMock(), {}
        config = SimpleNamespace(hidden_size=32, num_hidden_layers=2)
        model = SimpleNamespace(config=config)

        def load_subjects(name: str, **options) -> SimpleNamespace:
            loaded.update(options, model=name)
            return SimpleNamespace(rigpt=model, stock=model, stock_name="stock GPT-2", tokenizer=None)

        monkeypatch.setitem(sys.modules, "gradio", gradio)
        monkeypatch.setattr(rotation_view, "load_subjects", load_subjects)
        for name in ("MODEL", "BASELINE"):
            monkeypatch.delenv(f"RIGPT_SPACE_{name}", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(f"RIGPT_SPACE_{name}", value)
        runpy.run_path(str(tmp_path / "app.py"))
        return "\n".join(call.args[0] for call in gradio.Markdown.call_args_list if call.args), loaded

    return run


@pytest.mark.parametrize("baseline", [None, "openai-community/gpt2"])
@pytest.mark.parametrize("environment", [{}, {"MODEL": "", "BASELINE": ""}], ids=["unset", "empty"])
def test_the_page_names_what_it_shows(baseline, environment, page):
    text, loaded = page(baseline, environment)
    assert loaded == {"model": "me/rigpt", "revision": "0123abc", "baseline": baseline}
    assert "RiGPT: [me/rigpt](https://huggingface.co/me/rigpt) at `0123abc`." in text
    named = f"Stock model: [{baseline}](https://huggingface.co/{baseline})." if baseline else "Stock model: the export"
    assert named in text


def test_the_same_baseline_twice_is_still_named(page):
    text, _ = page("openai-community/gpt2", {"BASELINE": "openai-community/gpt2"})
    assert "Stock model: [openai-community/gpt2]" in text


@pytest.mark.parametrize("baseline", [None, "openai-community/gpt2"])
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MODEL": "runs/mine"}, {"model": "runs/mine", "revision": None, "baseline": None}),
        ({"BASELINE": "runs/other"}, {"model": "me/rigpt", "revision": "0123abc", "baseline": "runs/other"}),
        (
            {"MODEL": "runs/mine", "BASELINE": "runs/other"},
            {"model": "runs/mine", "revision": None, "baseline": "runs/other"},
        ),
        # Without the commit it may be another one.
        ({"MODEL": "me/rigpt"}, {"model": "me/rigpt", "revision": None, "baseline": None}),
    ],
    ids=["model", "baseline", "both", "newest"],
)
def test_models_that_were_replaced_are_not_named(baseline, environment, expected, page):
    text, loaded = page(baseline, environment)
    assert loaded == expected
    assert "stands still" in text  # the page is there
    assert "RiGPT: [" not in text and "Stock model:" not in text and "huggingface.co" not in text
