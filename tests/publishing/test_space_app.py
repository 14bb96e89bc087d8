"""What the app of a Space says about the models that it shows, without a browser, Gradio and weights."""

import runpy
import sys
from itertools import product
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


BASELINES = (None, "openai-community/gpt2")


def test_the_page_names_what_it_shows(page):
    same = {"BASELINE": BASELINES[1]}
    for baseline, environment in [*product(BASELINES, ({}, {"MODEL": "", "BASELINE": ""})), (BASELINES[1], same)]:
        text, loaded = page(baseline, environment)
        assert loaded == {"model": "me/rigpt", "revision": "0123abc", "baseline": baseline}
        assert "RiGPT: [me/rigpt](https://huggingface.co/me/rigpt) at `0123abc`." in text
        named = f"[{baseline}](https://huggingface.co/{baseline})." if baseline else "the export"
        assert f"Stock model: {named}" in text


def test_models_that_were_replaced_are_not_named(page):
    for baseline, (environment, model, revision, shown) in product(
        BASELINES,
        (
            ({"MODEL": "runs/mine"}, "runs/mine", None, None),
            ({"BASELINE": "runs/other"}, "me/rigpt", "0123abc", "runs/other"),
            ({"MODEL": "runs/mine", "BASELINE": "runs/other"}, "runs/mine", None, "runs/other"),
            ({"MODEL": "me/rigpt"}, "me/rigpt", None, None),  # without the commit it may be another one
        ),
    ):
        text, loaded = page(baseline, environment)
        assert loaded == {"model": model, "revision": revision, "baseline": shown}
        assert "stands still" in text  # the page is there
        assert "RiGPT: [" not in text and "Stock model:" not in text and "huggingface.co" not in text
