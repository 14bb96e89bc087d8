"""The modern baseline is what it is said to be, preferred basis included."""

import pytest
import torch

from evaluation.experiments.modern import GATE_COORDINATES, CoordinateGate, ModernGPTConfig, ModernGPTForCausalLM
from rigpt_hf.symmetry import haar
from rigpt_hf.training.muon import muon_param_groups
from tests.evaluation.experiments.runs import trained
from tests.model.agreement import assert_different, assert_same
from tests.models import randomise_, tokens
from tests.training.runs import pretrain
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


def test_only_its_gates_prefer_a_basis():
    for gated in (False, True):
        model = randomise_(modern_model().double().eval(), seed=0, scale=0.2)
        if not gated:
            with torch.no_grad():
                model.model.layers[2].self_attn.value_gate.weight.zero_()
                model.model.layers[0].previous_token.gate.weight.zero_()
        before = model(tokens(2, 11)).logits
        turn_the_stream_(model, haar(32, torch.Generator().manual_seed(1)))
        (assert_different if gated else assert_same)(model(tokens(2, 11)).logits, before)


def test_multipliers_are_by_module():
    model = modern_model()
    groups = muon_param_groups(model, 0.01, 0.1, lr_multipliers={"embed_tokens": 3, "residual_weight": 0.5})
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.model.embed_tokens.weight)] == pytest.approx(0.03)
    assert rates[id(model.model.layers[1].residual_weight)] == pytest.approx(0.005)
    assert rates[id(model.lm_head.weight)] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="`lr_multipliers` must be keyed by modules of the model, got head"):
        muon_param_groups(model, 0.01, 0.1, lr_multipliers={"head": 3})


@pytest.mark.full
def test_it_trains_and_comes_back(tmp_path):
    trained(tmp_path, "modern-gpt", {}, optim="muon", learning_rate=0.01, lr_multipliers={"lm_head": 0.5})


def test_it_cannot_be_trained_without_a_basis(tmp_path):
    with pytest.raises(ValueError, match="`optim` must be `adamw` or `muon` for `model_kind` `modern-gpt`"):
        pretrain(tmp_path, tmp_path, model_kind="modern-gpt", config_overrides={})
