"""The site: what generates its pages, without MkDocs; and with it, a strict build."""

import html
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rigpt_hf.cli import VERBS


ROOT = Path(__file__).resolve().parents[1]
HOW_TO = sorted((ROOT / "docs/how-to").glob("*.md"))
sys.path.insert(0, str(ROOT / "docs/site"))

import course  # noqa: E402
import hooks  # noqa: E402
import links  # noqa: E402
import refusals  # noqa: E402


CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages() -> dict[str, str | bytes]:
    return hooks.generated()


def test_the_navigation_names_every_page_once(pages):
    there = hooks.every_page(pages)
    named = hooks.walked(hooks.expanded(CONFIG["nav"], there))
    assert len(named) == len(set(named)) > 60
    assert sorted(named) == there, "the navigation lacks pages, or names some that do not exist"
    assert {"how-to/merge.md", "flow.md", "verbs/convert.md", "course/1_gpt.md", "api/rigpt_hf.symmetry.md"} <= set(
        named
    )
    nav = ["a.md", {"B": ["*.md", "c/*.md"]}]
    assert hooks.expanded(nav, ["a.md", "b.md", "c/d.md", "c/e/f.md"]) == ["a.md", {"B": ["b.md", "c/d.md"]}]


def test_every_verb_has_a_page_with_every_option(pages):
    for verb in VERBS:
        page = pages[f"verbs/{verb.__name__}.md"]
        assert f"[`rigpt {verb.__name__}`]" in pages["verbs/index.md"]
        assert f"rigpt {verb.__name__} " in page or verb.__name__ == "families"
    assert len(VERBS) > 20
    convert = pages["verbs/convert.md"]
    assert (
        "| `--max-shard-size <str>` | 5GB | Largest file. |" in convert and "| `source <str>` | required |" in convert
    )
    assert "rigpt convert openai-community/gpt2 my-rigpt" in convert and "(../how-to/convert.md)" in convert
    assert "| `--save-steps <int>` |" in pages["verbs/pretrain.md"] and "`--save-steps" not in convert


def test_no_generated_page_is_empty(pages):
    assert {"index.md", "configuration.md", "troubleshooting.md", "api/rigpt_hf.optim.md"} <= set(pages)
    for uri, content in pages.items():
        assert len(content) > 20 and (b"\x89PNG" if isinstance(content, bytes) else content), uri
        if isinstance(content, str):
            assert "# " in content, uri
    assert all("::: rigpt_hf" in text for uri, text in pages.items() if uri.startswith("api/"))
    assert sum(re.match(r"course/\d\w+\.md", uri) is not None for uri in pages) == 7


def test_outputs_of_a_notebook_are_shown():
    outputs = [{"text": ["\x1b[31mred\x1b[0m\n"]}, {"data": {"image/png": "iVBORw==\n", "text/plain": "<Image>"}}]
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": "c()", "outputs": outputs},
    ]
    made = course.page("x", {"cells": cells})
    assert made["course/x-1.png"] == b"\x89PNG" and len(made) == 2
    assert "# A\nb\n\n```python\nc()\n```\n\n```text\nred\n```\n\n![Figure 1" in made["course/x.md"]
    assert "Image" not in made["course/x.md"]


# As somebody sees them, with words for the values: texts in one piece, from parts, from a function that is given
# parts, and of options that have no exact form.
SEEN = [
    "must not replace what is read, got",
    "exclude each other, got",
    "`folder` must hold a model or an adapter, got folder, which holds an adapter",
    "turn whole heads, but would be by RiGPT. Remove it from the source's configuration",
    "it multiplies single coordinates of the stream by random numbers in training. Set it to 0",
    "`prompt` must be a text, got ''. Write it behind the model, or pipe it in.",
]


def test_refusals_are_found_by_their_text():
    texts = [one.plain for one in refusals.refusals()]
    assert len(texts) > 800
    for seen in SEEN:
        assert any(seen in text for text in texts), seen
    assert not any("must be a bicycle" in text for text in texts)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "raise ValueError(f'`x` must be {low} or more, got {len(values)}.')",
            "`x` must be low or more, got number of values.",
        ),
        ("raise ValueError('`x` must be whole, ' + f'got {self.item!r}.'.strip())", "`x` must be whole, got item."),
        (
            'raise ValueError(f"`x` must be one of {COMMA.join(KINDS)}.")'.replace("COMMA", "', '"),
            "`x` must be one of KINDS.",
        ),
        ("why = 'a reason'\n    raise ValueError(f'`x` is refused for {why}.')", "`x` is refused for a reason."),
    ],
)
def test_values_become_words(source, text, monkeypatch):
    import ast

    tree = ast.parse(f"def f():\n    {source}")
    monkeypatch.setattr(refusals, "trees", lambda: {"a.py": tree})
    for cached in (refusals.errors, refusals.constants, refusals.makers):
        monkeypatch.setattr(refusals, cached.__name__, cached.__wrapped__)
    assert [one.plain for one in refusals.refusals()] == [text]


def test_the_page_of_refusals_shows_signs_as_they_are():
    shown = refusals.marked(
        f"`{refusals.BEGIN}key{refusals.END}` must be <s>, got *{refusals.BEGIN}value{refusals.END}*."
    )
    assert shown == r"<code><em>key</em></code> must be &lt;s&gt;, got \*<em>value</em>\*."


def test_links_lead_to_pages_or_to_the_repository():
    text = "[`docs/flow.md`](docs/flow.md), [a](rigpt_hf/frames.py), [b](https://x.org), `docs/verify.md`\n"
    text += "```\n[c](docs/flow.md)\n```"
    plain = links.rewritten(text, "README.md")
    assert plain.startswith(
        "[From layers to flow](flow.md), a, [b](https://x.org), [Was it the same model afterwards](verify.md)"
    )
    assert plain.endswith("```\n[c](docs/flow.md)\n```"), "code stays"
    assert "[a](https://host/rigpt_hf/frames.py)" in links.rewritten(text, "README.md", "https://host")
    picture = "![x](https://host/raw/main/docs/figures/merging.png)"
    assert links.rewritten(picture, "README.md", "https://host/blob/main") == "![x](figures/merging.png)"
    assert links.rewritten(picture, "README.md") == picture
    assert links.rewritten("[x](1_gpt.ipynb#a)", "docs/course/README.md") == "[x](1_gpt.md#a)"
    assert links.rewritten("[x](../families.md)", "docs/how-to/convert.md") == "[x](../families.md)"
    assert links.rewritten("[x](gone.md)", "README.md") == "[x](gone.md)", "a strict build refuses it"


@pytest.mark.skipif(not find_spec("mkdocs") or not find_spec("mkdocstrings"), reason="needs the extra `docs`")
@pytest.mark.parametrize(
    "fault",
    [pytest.param("", id="whole"), pytest.param("[gone](gone.md)", id="with a broken link", marks=pytest.mark.full)],
)
def test_a_strict_build(fault, tmp_path):
    for name in ("docs", "rigpt_hf", "training", "evaluation", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("mkdocs.yml", "pyproject.toml", *links.FRONT):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "evaluation/results").symlink_to(ROOT / "evaluation/results")
    with (tmp_path / "docs/verify.md").open("a", encoding="utf-8") as page:
        page.write(fault)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
    )
    if fault:
        assert done.returncode and "gone.md" in done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    index = (tmp_path / "out/search/search_index.js").read_text(encoding="utf-8")
    assert "must not replace what is read" in index and "must be a bicycle" not in index
    solved = 0
    for page in (tmp_path / "out").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)', text)
        assert not fetched, f"{page.name} fetches {fetched}"
        shown = re.sub(r"<(pre|code|script|title)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
        front = [words for words in ("boost:", "\\begin", "\\langle", "$x", "d^2") if words in shown]
        assert not front, f"{page.name} shows {front} as it is written"
        solved += len(re.findall(r"<details>.*?<li>.*?<math.*?</details>", text, re.DOTALL))
    assert solved == 7, "solutions of chapters are no lists with formulas"


@pytest.mark.skipif(not find_spec("latex2mathml"), reason="needs the extra `docs`")
def test_a_formula_that_would_not_be_drawn_ends_the_build():
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))

    def content(formula: str) -> str:
        return hooks.on_page_content(f'<div class="arithmatex">\\[{formula}\\]</div>', page, None, None)

    drawn = content(r"\begin{aligned} x &amp;= \big\langle a \big\rangle \\ y &amp;\mathrel{+}= b \end{aligned}")
    assert drawn.count("<mtr>") == 2 and "amp" not in drawn and "\\" not in drawn
    letters = content(r"\mathbf 1 \mathfrak{so} \mathbb{R} \mathbb{Z} \mathfrak{C} \mathbf{\Omega} \mathrm{e}")
    assert html.unescape(re.sub("<[^>]*>|\\s", "", letters)) == "𝟏𝔰𝔬ℝℤℭ𝛀e" and not re.search(
        'mathvariant="[^n]', letters
    )
    with pytest.raises(PluginError, match=r"page.md.*\\unheard"):
        content(r"x = \unheard{a}")
