"""`rigpt quantize` and `rigpt prune`: what they write loads, and has the losses that they say."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rigpt_hf.checkpoints.opened import find_model
from rigpt_hf.cli.compression import say_cost, texts_for
from rigpt_hf.quantization import calibration
from rigpt_hf.quantization.calibration import held_out_tokens, window_losses
from rigpt_hf.text.sources import documents
from rigpt_hf.text.tokenizer import load_tokenizer

from .conftest import in_one_line


@pytest.fixture(autouse=True)
def text(monkeypatch, folders):
    """In the place of the documentation of all packages, which takes a while to find."""
    words = (folders / "text.txt").read_text().split()
    passages = [" ".join(words[i % 7 :] + words[: i % 7]) for i in range(400)]
    monkeypatch.setattr(calibration, "gather_documentation", lambda size, part: passages[::-1])
    monkeypatch.setattr(calibration, "documents", lambda source, megabytes: iter(passages))


def losses_of(folder, tokenizer_folder) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    context = model.config.max_position_embeddings
    return window_losses(model, held_out_tokens(tokenizer, tokens=256, context=context))


SHORT = ("--tokens", 2048, "--judge", 256)


def test_a_quantized_folder_loads_and_has_the_loss_that_was_said(done, folders, tmp_path):
    out = done("quantize", folders / "rigpt", tmp_path / "q", *SHORT, "--tune", 2, "--group", "none")
    assert "bits per weight" in out and "Nats per token" in out
    facts = json.loads((tmp_path / "q/quantize.json").read_text())
    before, after = (values["documentation"] for values in facts["loss"].values())
    assert facts["recipe"]["tune"] == 2 and before != after
    losses = losses_of(tmp_path / "q", folders / "rigpt")
    assert sum(losses) / len(losses) == pytest.approx(after, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert model.model.layers[0].mlp.up_proj.codes.dtype == torch.uint8


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_without_text_tokens_are_drawn(done, folders, tmp_path, monkeypatch, method):
    monkeypatch.setattr(calibration, "documents", None)
    options = ("--calibrate", "none", "--method", method, "--frame", "own", "--bits", 8)
    done("quantize", folders / "rigpt", tmp_path / "q", *SHORT, *options)
    facts = json.loads((tmp_path / "q/quantize.json").read_text())
    before, after = (values["documentation"] for values in facts["loss"].values())
    assert abs(after - before) < 0.05 and facts["calibrate"] == "none"


@pytest.mark.parametrize("way", [(), ("--lora", 2, "--mixed-precision", "bf16")], ids=["all", "adapter"])
def test_a_pruned_folder_is_smaller_and_has_the_loss_that_was_said(way, done, folders, tmp_path):
    sizes = ("--neurons", 0.25, "--heads", 2, "--recover", 2, *way)
    out = done("prune", folders / "rigpt", tmp_path / "p", *SHORT, *sizes)
    assert "recovered, 2 steps" in out
    facts = json.loads((tmp_path / "p/prune.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert model.config.num_attention_heads == 2 and facts["heads"] == 2
    losses = losses_of(tmp_path / "p", folders / "rigpt")
    said = facts["loss"]["recovered, 2 steps"]["documentation"]
    assert sum(losses) / len(losses) == pytest.approx(said, rel=1e-5)
    assert said != facts["loss"]["pruned"]["documentation"] != facts["loss"]["before"]["documentation"]


def test_recovery_reads_a_window_a_step_and_moments_no_more_than_was_asked(folders):
    place, names = find_model(str(folders / "rigpt")), ["default"]
    few, many = (texts_for(place, names, 2048, 2048, windows)[0] for windows in (0, 200))
    assert few.numel() <= 2048 and len(few) < len(many) == 200 and torch.equal(many[: len(few)], few)


def test_the_end_of_a_text_judges(done, folders, tmp_path):
    texts = ("--calibrate", f"default,{folders / 'text.txt'}")
    done("prune", folders / "rigpt", tmp_path / "p", *SHORT, "--neurons", 0.25, *texts)
    facts = json.loads((tmp_path / "p/prune.json").read_text())
    assert set(facts["loss"]["pruned"]) == {"documentation", "end of text.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "--bits", 5), "`--bits` must be one of 4, 8, got '5'"),
        (("quantize", "--group", 7), "`--group` must be one of none, 32, 64, 128, got '7'"),
        (("quantize", "--group", 128), "`--group` must divide"),
        (("quantize", "--method", "gtpq"), "Did you mean 'gptq'?"),
        (("quantize", "--calibrate", "no.txt"), "`--calibrate` must be default, none, files"),
        (("quantize", "--calibrate", "none", "--tune", 3), "`--tune` must be a number of steps, and 0 without text"),
        (("quantize", "--tokens", 10), "`--tokens` must be at least 2048"),
        (("prune",), "`--neurons`, `--heads` or `--rank` must say what shall go"),
        (("prune", "--neurons", 0.5, "--judge", 1), "`--judge` must be at least 96"),
        (("prune", "--neurons", 0.5, "--recover", 9, "--calibrate", "none"), "`--recover` must be 0 without text"),
        (("prune", "--neurons", 0.5, "--recover", -1), "`--recover` must be a number of steps"),
        (("prune", "--neurons", 0.5, "--lora", 8), "`--lora` is of the steps of `--recover`, got 8 without any"),
        (("prune", "--neurons", 0.5, "--recover", 9, "--lora", 0), "`--lora` must be a rank of at least 1, got 0"),
        (("prune", "--neurons", 0.5, "--recover", 9, "--mixed-precision", "fp16"), "`--mixed-precision` must be"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_ends_in_one_line(rigpt, folders, tmp_path, arguments, message):
    verb, *options = arguments
    assert message in in_one_line(rigpt(verb, folders / "rigpt", tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_a_text_among_several_is_named_by_the_option(rigpt, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "documents", documents)  # the texts are real ones here
    (tmp_path / "empty").mkdir()
    texts = f"{folders / 'text.txt'},{tmp_path / 'empty'}"
    arguments = (folders / "rigpt", tmp_path / "out", *SHORT, "--calibrate", texts)
    assert "`--calibrate` must be or hold files that end in .txt" in in_one_line(rigpt("quantize", *arguments))
    (tmp_path / "short.txt").write_text("a b")
    arguments = (*arguments[:-1], f"{tmp_path / 'short.txt'}")
    for verb in (("quantize",), ("prune", "--neurons", 0.5)):
        line = in_one_line(rigpt(verb[0], *arguments, *verb[1:]))
        assert "`--calibrate` must hold at least one window of" in line and "short.txt" in line
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(rigpt, done, folders, tmp_path):
    done("quantize", folders / "rigpt", tmp_path / "q", *SHORT, "--method", "round")
    assert "quantized already" in in_one_line(rigpt("quantize", tmp_path / "q", tmp_path / "again", *SHORT))


def test_what_is_simulated_comes_back_with_the_folder(done, folders, tmp_path):
    options = ("--activations", 8, "--cache", 4, "--tune", 0)
    out = done("quantize", folders / "rigpt", tmp_path / "q", *SHORT, *options)
    assert "Simulated, as no kernel computes with it: activations of 8 bits, cache of 4 bits" in out
    facts = json.loads((tmp_path / "q/quantize.json").read_text())
    _, said = (values["documentation"] for values in facts["loss"].values())
    losses = losses_of(tmp_path / "q", folders / "rigpt")
    assert sum(losses) / len(losses) == pytest.approx(said, abs=1e-6)
    config = json.loads((tmp_path / "q/config.json").read_text())
    config["quantization_config"]["recipe"]["seed"] = 1  # other signs of what turns the neurons
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    assert losses_of(tmp_path / "q", folders / "rigpt") != losses


def test_costs_are_said_in_units_that_fit_or_not_at_all(capsys):
    model = torch.nn.Linear(1000, 2500, bias=False)
    for seconds, steps, said in (
        (1e-3, 0, ""),
        (0.01, 0, "About 4 minutes more, and 30 MB of memory.\n"),
        (0.01, 48, "About 28 minutes more, and 40 MB of memory.\n"),
    ):
        say_cost(model, seconds, 1000, steps)
        assert capsys.readouterr().out == said
