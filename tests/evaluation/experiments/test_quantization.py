"""The experiment on few bits: baselines are the stock model, texts are kept apart, all rows run."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.experiments import quantization
from evaluation.experiments.learned_rotation import Peaks, learned_frame
from rigpt_hf.conversion import convert_model
from rigpt_hf.quantization import all_moments, quantize_model

from ...checkpoints.folders import save_tokenizer
from ...model.agreement import difference
from ...models import randomise_, tokens
from ...tolerances import CONVERSION, SYMMETRY


WORDS = "a b c a c b b a "


@pytest.fixture(scope="module")
def stock() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return randomise_(LlamaForCausalLM(config), 0, 0.1).eval()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folders = []
    for index in range(4):
        folder = tmp_path / "site-packages" / f"package{index}"
        folder.mkdir(parents=True)
        sentences = [
            f"Number {i} of the package {'xyzw'[index] * (i + 1)} is a sentence of words." for i in range(200)
        ]
        (folder / "README.md").write_text(
            "\n\n".join([*sentences, "This is what all of them have copied " * 3 + "on."])
        )
        folders.append(folder)
    monkeypatch.setattr(quantization, "folders_of_packages", lambda: folders)
    return folders


def test_gains_are_those_of_the_norms_in_front(stock):
    model = convert_model(stock).eval()
    gains = quantization.stock_gains(stock, model)
    assert gains is not None and len(gains) == 14
    for index, layer in enumerate(stock.model.layers):
        for name, gain in gains.items():
            if f".{index}.self_attn." in name and "o_proj" not in name:
                assert torch.allclose(gain, layer.input_layernorm.weight, rtol=CONVERSION[torch.float32] * 10)
    name = "model.layers.1.mlp.up_proj"
    assert (gains[name] - 1).abs().max() > 0.1
    codes = quantize_model(model, quantization.ROUNDED, gains=gains).codes[name]
    plain = stock.get_submodule(name).weight
    steps = plain.abs().amax(1, keepdim=True) / 7
    assert ((codes.dense() / gains[name] - plain).abs() <= 0.51 * steps).all()
    stock.get_submodule(name).weight.data[0, 0] += 1
    try:
        assert quantization.stock_gains(stock, model) is None
    finally:
        stock.get_submodule(name).weight.data[0, 0] -= 1


def test_packages_that_judge_are_others(packages):
    calibrating, judging = quantization.documentation(10**6)
    parts = [{name for name in "xyzw" if f"package {name}" in text} for text in (calibrating, judging)]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    assert "have copied" in calibrating and "have copied" not in judging


@pytest.mark.full
def test_the_whole_table_of_a_tiny_model(stock, packages, tmp_path):
    stock.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text(WORDS * 400)
    arguments = [tmp_path / "model", tmp_path / "valid.txt", tmp_path / "test.txt", "--windows", 3, "--context", 16]
    arguments += ["--calibration-windows", 8, "--tune", 2, "--output", tmp_path / "out.json"]
    assert quantization.main(list(map(str, arguments))) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    tuned = {f"{name} tuned" for name, row in quantization.ROWS.items() if row.tune}
    assert set(result["rows"]) == set(quantization.ROWS) | tuned and len(tuned) == 5
    for name, row in result["rows"].items():
        assert len(row["test.txt"]["losses"]) == 3 and 2.9 < row["bits_per_weight"] < 5
        assert bool(row["simulated"]) is any(word in name for word in ("A8", "A4", "KV4"))
    assert len({row["test.txt"]["value"] for row in result["rows"].values()}) > 15


@pytest.mark.parametrize("group", [None, 32])
def test_a_learned_frame_has_lower_peaks_and_the_same_function(stock, group):
    model = convert_model(stock).eval().double()
    ids = tokens(4, 32, vocab_size=8)
    moments = all_moments(model, ids)
    start, same = learned_frame(model, moments, group, 0)
    g, left = learned_frame(model, moments, group, 40)
    assert same == pytest.approx(1, abs=1e-6) and left < 0.97
    assert not torch.equal(*(each.elements["stream"] for each in (start, g)))
    assert difference(model(ids).logits, g(model)(ids).logits) < SYMMETRY[torch.float64]
    strengths = {name: float(seen.trace()) for name, seen in moments.items()}
    one = torch.eye(64)
    before, after = (Peaks(each(model), strengths, group)(one) for each in (start, g))
    assert float(after / before) == pytest.approx(left, rel=1e-4)  # in the frame itself


def test_impossible_options_are_refused(stock, packages, tmp_path, capsys):
    stock.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b c")
    arguments = [str(tmp_path / name) for name in ("model", "text.txt", "text.txt")]
    assert quantization.main([*arguments, "--rows", "AWQ"]) == 2
    assert "must name some of stock rounded per row, stock GPTQ" in " ".join(capsys.readouterr().err.split())
    assert quantization.main([*arguments, "--windows", "2"]) == 2
    assert "must fit into the 3 tokens of the text, got 32 windows of 512. Take fewer" in " ".join(
        capsys.readouterr().err.split()
    )
