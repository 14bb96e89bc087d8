"""The modern baseline, and Muon with AdamW for the rest: what they are said to be, preferred basis included."""

import pytest
import torch

from rigpt_hf.optim import EquivariantOptimizer
from rigpt_hf.symmetry import haar
from rigpt_hf.training.modern import (
    GATE_COORDINATES,
    CoordinateGate,
    ModernGPTConfig,
    ModernGPTForCausalLM,
    muon_param_groups,
)
from tests.model.agreement import assert_different, assert_same
from tests.models import randomise_, tiny_model, tokens
from tests.training.runs import make_data, pretrain
from tests.training.streams import turn_the_stream_


TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "rms_norm_eps": 1e-5}


def modern_model() -> ModernGPTForCausalLM:
    torch.manual_seed(0)
    return ModernGPTForCausalLM(ModernGPTConfig(**TINY, max_position_embeddings=48))


def test_it_starts_as_recipes_do():
    model = modern_model()
    assert abs(float(model.model.embed_tokens.weight.std()) - 1) < 0.05
    assert abs(float(model.lm_head.weight.std()) - 1e-3) < 1e-4
    for layer in model.model.layers:
        assert abs(float(layer.self_attn.q_proj.weight.std()) - 32**-0.5) < 0.02
        assert not layer.self_attn.o_proj.weight.any() and not layer.mlp.down_proj.weight.any()
    gates = [layer.self_attn.value_gate for layer in model.model.layers]
    assert [isinstance(gate, CoordinateGate) for gate in gates] == [False, False, True]
    assert gates[2].weight.shape == (4, GATE_COORDINATES) and not gates[2].weight.any()


@pytest.mark.parametrize("gated", [False, True])
def test_only_its_gates_prefer_a_basis(gated):
    model = randomise_(modern_model().double().eval(), seed=0, scale=0.2)
    if not gated:
        with torch.no_grad():
            model.model.layers[2].self_attn.value_gate.weight.zero_()
            model.model.layers[0].previous_token.gate.weight.zero_()
    before = model(tokens(2, 11)).logits
    turn_the_stream_(model, haar(32, torch.Generator().manual_seed(1)))
    (assert_different if gated else assert_same)(model(tokens(2, 11)).logits, before)


def test_muon_moves_matrices_and_adamw_the_rest():
    model, twin = (tiny_model(dtype=torch.float32, tie_word_embeddings=False) for _ in range(2))
    groups = muon_param_groups(model, lr=0.01, weight_decay=0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    matrices, others, vectors = [], [], []
    for name, parameter in twin.named_parameters():
        table = name in ("model.embed_tokens.weight", "lm_head.weight")
        (vectors if parameter.dim() < 2 else others if table else matrices).append(parameter)
    assert matrices and len(others) == 2 and vectors
    ours = EquivariantOptimizer(groups, 0.01)
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.01,
            betas=(0.9, 0.95),
        ),
    ]
    start = [parameter.detach().clone() for parameter in twin.parameters()]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    known = {id(parameter) for parameter in matrices}
    for a, b, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        # Muon iterates in bfloat16, so the two agree to its rounding; AdamW to that of float32.
        tolerance = 0.03 if id(b) in known else 1e-4
        assert (a - b).norm() <= tolerance * (b - before).norm()
        assert (b - before).norm() > 0


def test_multipliers_are_by_module():
    model = modern_model()
    groups = muon_param_groups(model, 0.01, 0.1, multipliers={"embed_tokens": 3, "residual_weight": 0.5})
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.model.embed_tokens.weight)] == pytest.approx(0.03)
    assert rates[id(model.model.layers[1].residual_weight)] == pytest.approx(0.005)
    assert rates[id(model.lm_head.weight)] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="`multipliers` must be keyed by modules of the model, got head"):
        muon_param_groups(model, 0.01, 0.1, multipliers={"head": 3})


@pytest.mark.parametrize("kind", ["modern-gpt", "stock-gpt2", "rigpt"])
def test_it_trains_and_comes_back(kind, tmp_path):
    data = make_data(tmp_path)
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    if kind != "stock-gpt2":
        config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"model_kind": kind, "config_overrides": config}
    optimizer = {
        "optim": "muon",
        "learning_rate": 0.01,
        "lr_multipliers": {"lm_head" if kind == "modern-gpt" else "wte": 0.5},
    }
    optimizer["multipliers"] = {} if kind == "rigpt" else optimizer["multipliers"]
    report = pretrain(data, tmp_path / "run", **model, **optimizer, max_steps=20)
    assert report.losses[-1] < report.losses[0] - 0.3
    more = {"model_kind": kind, "init_from": str(report.model_folder), "config_overrides": {}}
    going_on = pretrain(data, tmp_path / "more", **more, **optimizer, max_steps=8)
    assert going_on.losses[0] < report.losses[0] - 0.3


@pytest.mark.parametrize("kind", ["modern-gpt", "stock-gpt2"])
def test_models_with_a_preferred_basis_cannot_be_trained_without_one(kind, tmp_path):
    with pytest.raises(ValueError, match=f"`optim` must be `adamw` or `muon` for `model_kind` `{kind}`"):
        pretrain(tmp_path, tmp_path, model_kind=kind, config_overrides={})
