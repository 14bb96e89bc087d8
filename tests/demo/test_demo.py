"""The demo, small: every stage runs, and what the report says was measured."""

import io
import json
import subprocess

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
from rigpt_hf.pictures.style import STYLE
from rigpt_hf.symmetry import GaugeTransformation, haar
from rigpt_hf.text.corpus import gather_documentation
from tests import processes
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", lambda command, env, **_: processes.run(*command[1:], **env))
        patch.setitem(STYLE, "figure.dpi", 30)
        report = run_demo(options, Console(file=output, width=150))
    return options, report, output.getvalue()


def test_the_report_has_a_figure_and_figures(demo):
    options, report, output = demo
    page = report.read_text()
    assert (options.output / "rotation.png").read_bytes().startswith(b"\x89PNG")
    assert "![What the rotation does](rotation.png)" in page
    assert page.count("passed") == 2 and "FAILED" not in page
    assert "greedy text | identical" in page and "sampled text, same seed | identical | different" in page
    assert "Exported back from the rotated frame to an unmodified `GPT2LMHeadModel`" in page
    row = next(line for line in page.splitlines() if "logits, relative change" in line)
    ours, stock = (float(cell.strip(" *")) for cell in row.split("|")[2:4])
    assert 0 < ours <= SYMMETRY[torch.float32] and stock > 0.1, "the rotation spares only the RiGPT"
    for stage in ("Gather", "tokenizer", "Train a stock GPT-2", "Convert", "Turn the whole", "Save it", "Done"):
        assert stage in output


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


def test_the_default_number_of_steps_is_that_of_the_recipe():
    assert DemoOptions().training_steps == Recipe.steps


def test_an_earlier_demo_is_replaced_only_by_force(demo):
    options, report, _ = demo
    with pytest.raises(ValueError, match="`output` must be empty or absent.*`force=True`"):
        run_demo(options)
    assert report.is_file()


def test_sources_that_are_of_no_use_are_refused_and_leave_nothing(tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            run_demo(DemoOptions(output=tmp_path / "out", **options), Console(file=io.StringIO()))

    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").write_text(" \n")
    refused("`text` must hold at least", text=tmp_path / "short.txt")
    refused("`text` must be a file or a folder", text=tmp_path / "missing.txt")
    refused("`text` must hold some text", text=tmp_path / "empty.txt")
    stock = stock_model("gpt2")
    stock.save_pretrained(tmp_path / "gpt2")
    convert_model(stock).save_pretrained(tmp_path / "rigpt")
    refused("`model` must come with its tokenizer", model=str(tmp_path / "gpt2"))
    refused("it is a RiGPT already", model=str(tmp_path / "rigpt"))
    assert {path.name for path in tmp_path.iterdir()} == {"short.txt", "empty.txt", "gpt2", "rigpt"}


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
