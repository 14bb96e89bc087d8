"""The experiment on gains of exports: its grid, what it compares, and that the one model is the other."""

import json

import pytest
import torch

from evaluation.experiments import export_gains
from rigpt_hf.conversion import certify, export_model
from rigpt_hf.conversion.families import TARGETS

from ...checkpoints.folders import save_tokenizer
from ...conversion.families import converted_family
from ...models import tiny_model, tokens
from ...tolerances import CONVERSION


@pytest.mark.parametrize("name", ["gpt2", "llama", "arcee-tied", "gemma", "gpt_neo"])
def test_gains_of_one_are_the_same_function(name):
    model = converted_family(name)[1]
    with torch.no_grad():
        stock = export_model(model)
        plain = export_gains.with_gains_of_one(stock, name.partition("-")[0], model.config)
    assert certify(stock, plain, tokens(2, 30)).relative_logit_error <= CONVERSION[torch.float64]
    before, after = (
        [value for key, value in model.state_dict().items() if ".0." in key and "bias" not in key and value.dim() == 1]
        for model in (stock, plain)
    )
    offset = TARGETS[name.partition("-")[0]].family.gain_offset
    assert len(after) == 2 and all((gain == 1 - offset).all() for gain in after)
    assert any((gain != 1 - offset).any() for gain in before)


def test_the_grid_of_llama_cpp():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    on_grid = export_gains.q4_0(weight)
    blocks, steps = on_grid.reshape(-1, 32), weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 8
    codes = blocks / steps
    assert (codes - codes.round()).abs().max() < 0.01 and codes.abs().max() < 8.01  # steps are in half precision
    error = (weight.reshape(-1, 32) - blocks).abs() / steps
    assert 0.4 < error.max() < 1.01 and error.mean() < 0.3
    assert torch.equal(export_gains.q4_0(torch.zeros(2, 32)), torch.zeros(2, 32))


def test_a_model_is_rounded_with_and_without(tmp_path):
    options = {"hidden_size": 64, "gated_mlp": True, "hidden_act": "silu", "converted_from": "llama"}
    model = tiny_model(dtype=torch.float32, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layers" in key and key.endswith(("q_proj.weight", "up_proj.weight", "gate_proj.weight")):
                parameter *= torch.exp2(torch.linspace(-3, 3, 64).roll(7))
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 200)
    arguments = [tmp_path / "model", tmp_path / "text.txt", "--windows", 2, "--context", 16]
    assert export_gains.main([*map(str, arguments), "--output", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    chosen, plain = (results[f"exported, gains {which}"] for which in ("chosen", "of 1"))
    assert abs(chosen["as it is"] / plain["as it is"] - 1) < CONVERSION[torch.float32]
    assert all(chosen[grid] != plain[grid] for grid in export_gains.GRIDS)
    assert export_gains.main([*map(str, arguments[:3]), "9999"]) == 2
