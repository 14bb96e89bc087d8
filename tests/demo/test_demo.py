"""The demo, small: every stage runs, and what the report says was measured."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import convert_model
from rigpt_hf.conversion.stock_rotation import rotate_stock
from rigpt_hf.demo.options import DemoOptions
from rigpt_hf.demo.rotation import mean_loss
from rigpt_hf.demo.run import run_demo
from rigpt_hf.demo.stock import Recipe
from rigpt_hf.symmetry import GaugeTransformation, haar
from rigpt_hf.text.corpus import gather_documentation, read_text
from tests.conversion.sources import stock_model
from tests.models import tokens
from tests.tolerances import SYMMETRY


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text.txt"
    passage = "The cat sat on the mat {i}. A dog, number {i}, looked at the cat and thought of {j} bones.\n\n"
    text.write_text("".join(passage.format(i=i, j=i * 7 % 13) for i in range(600)))
    options = DemoOptions(output=folder / "out", text=text, steps=3, points=3)
    output = io.StringIO()
    report = run_demo(options, Console(file=output, width=150))
    return options, report, output.getvalue()


def test_the_report_has_a_figure_and_figures(demo):
    options, report, _ = demo
    page = report.read_text()
    assert (options.output / "rotation.png").read_bytes().startswith(b"\x89PNG")
    assert "![What the rotation does](rotation.png)" in page
    assert page.count("passed") == 2 and "FAILED" not in page
    assert "greedy text | identical" in page and "sampled text, same seed | identical" in page
    assert "Exported back from the rotated frame to an unmodified `GPT2LMHeadModel`" in page


def test_the_rotation_spares_only_the_rigpt(demo):
    _, report, _ = demo
    row = next(line for line in report.read_text().splitlines() if "logits, relative change" in line)
    ours, stock = (float(cell.strip(" *")) for cell in row.split("|")[2:4])
    assert 0 < ours <= SYMMETRY[torch.float32]
    assert stock > 0.1
    assert "sampled text, same seed | identical | different" in report.read_text()


def test_the_saved_model_is_complete(demo):
    options, _, _ = demo
    model = AutoModelForCausalLM.from_pretrained(options.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(options.output / "model")
    assert isinstance(model, RiGPTForCausalLM)
    assert model.config.use_cache, "Trainer's setting leaked into the saved model"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.decode(tokenizer("The cat sat")["input_ids"]) == "The cat sat"
    certificate = json.loads((options.output / "model" / "certificate.json").read_text())
    assert certificate["passed"] and certificate["relative_logit_error"] > 0


def test_the_terminal_shows_every_stage(demo):
    _, _, output = demo
    for stage in ("Gather", "tokenizer", "Train a stock GPT-2", "Convert", "Turn the whole", "Save it", "Done"):
        assert stage in output


def test_the_default_number_of_steps_is_that_of_the_recipe():
    assert DemoOptions().steps == Recipe.steps


def test_an_earlier_demo_is_replaced_only_by_force(demo):
    options, report, _ = demo
    with pytest.raises(ValueError, match="Pass --force"):
        run_demo(options)
    assert report.is_file()


def test_too_little_text_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="`text` must hold at least"):
        run_demo(DemoOptions(output=tmp_path / "out", text=tmp_path / "short.txt"), Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_missing_or_empty_text_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="`text` must be a readable"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="`text` must hold some text"):
        read_text(tmp_path / "empty.txt")


def test_a_model_without_a_tokenizer_or_already_a_rigpt_is_refused(tmp_path):
    console = Console(file=io.StringIO())
    stock = stock_model("gpt2")
    stock.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="`model` must come with its tokenizer"):
        run_demo(DemoOptions(output=tmp_path / "out", model=str(tmp_path / "gpt2")), console)
    convert_model(stock).save_pretrained(tmp_path / "rigpt")
    with pytest.raises(ValueError, match="it is a RiGPT already"):
        run_demo(DemoOptions(output=tmp_path / "out", model=str(tmp_path / "rigpt")), console)
    assert not (tmp_path / "out").exists()


def test_documentation_is_prose_deduplicated_and_repeatable(tmp_path):
    docstring = "This is a docstring that says something of note about a function. " * 3
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f'def f():\n    """{docstring}"""\n    return "{docstring}"\n')
    (tmp_path / "c.py").write_text(
        f'def g():\n    """{docstring} And more.\n\n    Args:\n        x: a number.\n    """\n'
    )
    (tmp_path / "short.py").write_text('"""Short."""\n')
    (tmp_path / "table.py").write_text('"""T' + "| 1.0 | 2.0 " * 30 + '."""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "d.py").write_text(
        '"""A test is no documentation of anything that a person would read."""\n'
    )
    (tmp_path / "page.md").write_text(
        "# Title\n\nA page of documentation is wrapped\nat any place, and this one too.\n"
    )
    passages = gather_documentation(10**6, roots=[tmp_path])
    assert len(passages) == 3
    assert "A page of documentation is wrapped at any place, and this one too." in passages
    assert sum(passage.startswith("This is a docstring") for passage in passages) == 2
    assert passages == gather_documentation(10**6, roots=[tmp_path])
    assert len(gather_documentation(300, roots=[tmp_path])) in (1, 2)
    # A virtual environment may itself lie below a folder of this name.
    assert gather_documentation(10**6, roots=[tmp_path / "tests"])


def test_rotating_the_stock_model_misses_only_the_gains():
    model = stock_model("gpt2")
    rotation = haar(model.config.n_embd, torch.Generator().manual_seed(0))
    windows = tokens(2, 16, vocab_size=model.config.vocab_size)
    before = model(windows).logits
    assert (rotate_stock(model, rotation)(windows).logits - before).abs().max() > 0.1 * before.abs().max()
    # Without gains and biases, and for a rotation that keeps the direction LayerNorm removes, nothing is missed.
    plain = stock_model("gpt2")
    for name, parameter in plain.named_parameters():
        if ".ln_" in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    config = convert_model(plain).config
    g = GaugeTransformation.random(config, torch.Generator().manual_seed(1), ["stream"], fix_ones=True)
    turned = rotate_stock(plain, g.elements["stream"][0])
    logits = plain(windows).logits
    assert (turned(windows).logits - logits).abs().max() <= SYMMETRY[torch.float64] * logits.abs().max()
    assert mean_loss(turned, windows) == pytest.approx(mean_loss(plain, windows), rel=SYMMETRY[torch.float64])
    assert isinstance(turned, GPT2LMHeadModel)
