"""Texts that somebody else wrote are read in cards, tables and pages as they were written, and are nothing more."""

import html
import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from rigpt_hf.demo.report import Findings, markdown
from rigpt_hf.evaluation.harness.report import as_html
from rigpt_hf.evaluation.harness.tables import as_markdown
from rigpt_hf.model_cards.card import render
from rigpt_hf.model_cards.marker import for_repository, is_unchanged, read_marker
from rigpt_hf.model_cards.metadata import AuthorMetadata, author_metadata
from rigpt_hf.model_cards.smaller import SmallerMetadata
from rigpt_hf.publishing.space import space_files
from rigpt_hf.text.markup import literal, literal_lines
from tests.model_cards.test_card import AUTHOR, CERTIFICATE, DIFFERENCE, EVALUATION, MODEL, TRAINING, known


MARKDOWN = MarkdownIt("commonmark").enable("table")
# Each means something to Markdown, HTML, YAML, Jinja or us.
CANARIES = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "end of an element": "</code></td></title>--><b>",
    "link": "[x](javascript:alert(1)) ](javascript:alert(1)) <javascript:alert(1)>",
    "reference": "![x][y] [y]: javascript:alert(1)",
    "emphasis": "**a** _b_ __c__ ` ~~e~~ a_b_c $f$",
    "cell": "a | b || c",
    "entity": "&lt;b&gt; &#60; \\<",
    "template": "{{ 7 * 7 }} {% raw %} ${title} $title",
    "yaml": "!!python/object/apply:os.system ['true']",
    "yaml key": "'a: b' # c: - d",
    "our own comment": '<!-- rigpt card {"weights": "1"} -->',
    "heading": "# a",
    "rule": "---",
    "underline": "===",
    "quotation": "> a",
}
# What only texts of several lines can be.
BLOCKS = {
    "rule": "a\n---\nb",
    "end of the header": "a\n\n---\nlicense: other\n---\n\nb",
    "heading": "a\n# b\n=====\n",
    "fence": "a\n```\nb\n~~~\nc",
    "element": "a\n<script>\nalert(1)\n</script>\n",
    "indented": "a\n\n        b\n\tc",
    "our own comment": 'a\n\n<!-- rigpt card {"weights": "1"} -->\n',
}


def structure(text: str) -> list[str]:
    """The kinds of all elements of a page of Markdown, one after the other."""
    kinds = []
    for token in MARKDOWN.parse(text):
        kinds += [token.type, *(child.type for child in token.children or () if child.type != "softbreak")]
    return kinds


def said(text: str) -> str:
    """All that a page of Markdown says, without its form."""
    tokens = (child for token in MARKDOWN.parse(text) for child in token.children or ())
    return " ".join(token.content for token in tokens if token.type == "text")


def test_an_escaped_text_is_one_text():
    for canary in CANARIES.values():
        assert structure(literal(canary)) == ["paragraph_open", "inline", "text", "paragraph_close"], canary
        assert said(literal(canary)) == canary
        # In HTML too.
        assert html.unescape(literal(canary)) == canary and not set("<>") & set(literal(canary))
        row = f"| a | b |\n|---|---|\n| {literal(canary)} | c |"
        assert structure(row) == structure("| a | b |\n|---|---|\n| x | c |") and canary in said(row)
    assert literal("a\n\n- b\x00\u202e c\t") == "a - b c "
    # Without an escape the canaries are other things, and names stay as they are.
    assert sum(structure(canary) != structure("x") for canary in CANARIES.values()) > 6
    for plain in ("me/my-model_1", "gpt2 (GPT2LMHeadModel)", "-0.25 (1.0 to 2.0)", "bits per byte", "q_proj.weight"):
        assert literal(plain) == plain
    # Words between backticks are code, which holds no markup; others are not.
    span = "`a`: must be *b* `c[d](e)_f_` `"
    assert structure(literal(span)) == structure("`x` y `z` y") and literal(literal("`a")) != literal("`a")
    for other in ("`<b>` ``c`` `d|e`", "` a`", "`a `", "```", "``", "`a", "a``b`"):
        assert structure(literal(other)) == structure("x") and said(literal(other)) == other
    assert literal_lines("One.\n\n- two\n  - three\n1. four") == "One.\n\n- two\n- three\n1. four"


def everywhere(text: str, lines: str = ""):
    """All that is known of a model with this text in every place, and `lines` where there may be several."""
    lines = lines or text
    author = AuthorMetadata(title=text, authors=text, license=text, description=lines, intended_use=lines)
    names = {text: {}, "GPT-2": {}}
    quantity = {"name": text, "unit": text, "better": "less", "difference": DIFFERENCE}
    quantity["models"] = {name: {"value": 1.25, "low": 1.2, "high": 1.3} for name in names}
    task = {"task": text, "metric": "perplexity", "models": names, "errors": {}, "quantities": [quantity]}
    task["absent"] = [{"model": "GPT-2", "what": text, "reason": text}]
    model = {"source": text, "type": text, "parameters": 1, "dtype": text}
    evaluation = EVALUATION | {"suite": {"name": text, "text": {"source": text, "documents": 1, "revision": None}}}
    evaluation |= {"models": dict.fromkeys(names, model), "tasks": [task], "code": {"rigpt_hf": text, "commit": text}}
    return known(
        author=replace(author, limits=lines, citation=lines),
        model=replace(MODEL, options=[text], attention_score=text),
        training=replace(TRAINING, source=text, optimizer=text, precision=text),
        certificate=replace(CERTIFICATE, source=text),
        merged=[(text, 0.5)],
        smaller=[SmallerMetadata("prune.json", text, [text], [text], [(text, [1.0])])],
        tuned=text,
        evaluation=evaluation,
        evaluated_as=text,
        doubt=text,
    )


@pytest.fixture(scope="module")
def plain() -> list[str]:
    return structure(ModelCard(render(everywhere("x"), "me/x")).text)


@pytest.mark.parametrize("case", CANARIES)
@pytest.mark.by_default(8)
def test_a_card_says_what_it_was_told_and_no_more(case, plain):
    canary = CANARIES[case]
    text = render(everywhere(canary), "me/x")
    card = ModelCard(text)
    assert structure(card.text) == plain
    assert said(card.text).count(canary) > 20
    # The header holds it as a value.
    assert card.data.model_name == card.data.license == canary
    assert set(card.data.to_dict()) == set(ModelCard(render(everywhere("x"), "me/x")).data.to_dict())
    assert read_marker(text).author["title"] == canary and is_unchanged(text, read_marker(text))
    renamed = for_repository(render(everywhere(canary)), "me/x")
    assert renamed == text


@pytest.mark.parametrize("case", BLOCKS)
def test_texts_of_several_lines_stay_in_their_place(case, plain):
    text = render(everywhere("x", BLOCKS[case]), "me/x")
    card = ModelCard(text)
    kinds = structure(card.text)
    assert {kind for kind in kinds if kind not in plain} == set()
    counted = ("heading_open", "hr", "html_block", "html_inline", "fence", "link_open", "table_open")
    assert [kinds.count(kind) for kind in counted] == [plain.count(kind) for kind in counted]
    assert card.data.license == "x" and read_marker(text).weights == "0" * 64
    assert is_unchanged(text, read_marker(text))


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and all that it says."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list = []
        self.said = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data):
        self.said += data

    def handle_comment(self, data):
        self.found.append(data)


@pytest.mark.parametrize("case", CANARIES)
def test_tables_and_reports_of_an_evaluation(case):
    canary, results = CANARIES[case], [everywhere(text).evaluation for text in (CANARIES[case], "x")]
    tables = [as_markdown(each) for each in results]
    assert structure(tables[0]) == structure(tables[1]) and said(tables[0]).count(canary) > 8
    pages = []
    for each in results:
        (task,) = each["tasks"]
        # Nothing to draw: letters of a picture are curves.
        tasks = [task | {"models": {}, "errors": {"GPT-2": task["task"]}}]
        pages.append(Elements(as_html(each | {"schema": 1, "created": task["task"], "tasks": tasks})))
    assert pages[0].found == pages[1].found and len(pages[0].found) > 50
    assert pages[0].said.count(canary) > 8


@pytest.mark.parametrize("case", CANARIES)
def test_the_page_of_a_space_and_the_report_of_the_demo(case):
    canary = CANARIES[case]
    pages = [space_files("me/x", title=text)["README.md"].decode() for text in (canary, "x")]
    assert structure(ModelCard(pages[0]).text) == structure(ModelCard(pages[1]).text)
    assert canary in said(pages[0]) and ModelCard(pages[0]).data.title == canary
    reports = [markdown(findings(text)) for text in (canary, "x")]
    assert structure(reports[0]) == structure(reports[1]) and said(reports[0]).count(canary) > 6


def findings(text: str) -> Findings:
    """Those of a demo of a model, on a corpus and with texts of this name."""
    effect = dict.fromkeys(("weights", "hidden_states", "equivariance", "logits", "loss_before", "loss_after"), 1.0)
    return Findings(
        source=text,
        parameters=10**6,
        seconds={},
        prompt=text,
        certificates=[CERTIFICATE],
        effect=SimpleNamespace(greedy=(text, text), sampled=(text, text), **effect),
        sweep=None,
        stock_loss=(1.0, 2.0),
        stock_logits=1.0,
        stock_text=(text, text),
        round_trip=None,
        loaded_back=0.0,
        loaded_as_remote_code=0.0,
        probabilities={},
        tokens=[],
        seed=0,
        curve=[(0, 1.0), (1, 0.5)],
        corpus=text,
    )


def test_metadata_are_data(tmp_path):
    """YAML that would make objects is refused, as is JSON of another kind in a card's own comment."""
    (tmp_path / "facts.yaml").write_text("title: !!python/object/apply:pathlib.Path.touch [canary]")
    with pytest.raises(ValueError, match="`metadata` must be a YAML file"):
        author_metadata(tmp_path / "facts.yaml")
    marked = render(known(author=AUTHOR), "me/x")
    line = marked.rstrip().rsplit("\n", 1)[1]
    for changed in (line.replace('"title": "RiGPT', '"title": {"a": 1}, "x": "'), "<!-- rigpt card {} -->"):
        with pytest.raises(ValueError, match="`card` must end with the comment of rigpt card as it was written"):
            read_marker(marked.replace(line, changed))
    assert json.loads(line[len("<!-- rigpt card ") : -len(" -->")])["repo"] == "me/x"
