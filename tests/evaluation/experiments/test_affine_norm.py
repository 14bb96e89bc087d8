"""RiGPT with the norms of other models: the same network while gains are 1, and with a preferred basis after."""

import pytest
import torch

from evaluation.experiments.affine_norm import AffineNormConfig, AffineNormForCausalLM, affine_norm_param_groups
from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.symmetry import haar
from rigpt_hf.training.kinds import KINDS
from tests.evaluation.experiments.runs import trained
from tests.model.agreement import assert_different, assert_same
from tests.models import randomise_, tokens
from tests.training.streams import turn_the_stream_


TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "embedding_norm": True,
    "qk_norm": True,
    "embedding_size": 16,
}
# At both ends of every layer, after the embedding and before the head.
NORMS = 6


def affine_model(stream_norm: str) -> AffineNormForCausalLM:
    torch.manual_seed(0)
    return AffineNormForCausalLM(AffineNormConfig(stream_norm, **TINY))


def norms(model) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if "norm" in name}


def test_it_has_a_gain_at_every_norm_of_the_stream_and_starts_as_rigpt():
    for stream_norm, per_norm in (("rmsnorm", 1), ("layernorm", 2)):
        model = affine_model(stream_norm)
        own = norms(model)
        assert len(own) == per_norm * NORMS
        assert all(bool((each == float(name.endswith("weight"))).all()) for name, each in own.items())
        torch.manual_seed(0)
        plain = RiGPTForCausalLM(RiGPTConfig(**TINY))
        shared = {name: each for name, each in model.state_dict().items() if name not in own}
        plain.load_state_dict(shared)
        # As long as gains are 1, RMSNorm is `n(x)`; LayerNorm takes the mean away all the same.
        same = assert_same if stream_norm == "rmsnorm" else assert_different
        same(model.double()(tokens(2, 11)).logits, plain.double()(tokens(2, 11)).logits)
    with pytest.raises(ValueError, match="`stream_norm` must be one of rmsnorm, layernorm, got 'batchnorm'"):
        AffineNormConfig("batchnorm")


def test_gains_and_means_prefer_a_basis():
    rotation = haar(32, torch.Generator().manual_seed(1))
    for stream_norm, gains, agrees in (
        ("rmsnorm", False, True),
        ("rmsnorm", True, False),
        ("layernorm", False, False),
    ):
        model = randomise_(affine_model(stream_norm).double().eval(), seed=0, scale=0.2)
        if not gains:
            with torch.no_grad():
                for name, each in norms(model).items():
                    each.fill_(float(name.endswith("weight")))
        before = model(tokens(2, 11)).logits
        turn_the_stream_(model, rotation)
        (assert_same if agrees else assert_different)(model(tokens(2, 11)).logits, before)


def test_its_matrices_are_trained_as_those_of_rigpt():
    model = affine_model("layernorm")
    torch.manual_seed(0)
    plain = RiGPTForCausalLM(RiGPTConfig(**TINY))
    multipliers = {"embed_tokens": 3.0}
    groups = affine_norm_param_groups(model, 0.01, 0.1, lr_multipliers=multipliers)
    theirs = KINDS["rigpt"].param_groups(plain, 0.01, 0.1, lr_multipliers=multipliers)
    kept = ("names", "shapes", "update_rule", "blocks", "dim", "lr", "weight_decay")
    assert [{key: group[key] for key in kept} for group in groups[:-1]] == [
        {key: group[key] for key in kept} for group in theirs
    ]
    own = norms(model)
    assert {id(each) for each in groups[-1]["params"]} == {id(each) for each in own.values()}
    assert groups[-1]["update_rule"] == "coordinatewise" and groups[-1]["weight_decay"] == 0.0
    assert all(parameter.requires_grad for parameter in model.parameters())
    frozen = next(iter(own.values())).requires_grad_(False)
    assert id(frozen) not in {id(each) for each in affine_norm_param_groups(model, 0.01, 0.1)[-1]["params"]}
    assert not frozen.requires_grad
    assert KINDS["affine-norm-rigpt"].param_groups is affine_norm_param_groups


@pytest.mark.parametrize("stream_norm", [pytest.param("rmsnorm", marks=pytest.mark.full), "layernorm"])
@pytest.mark.full
def test_it_trains_and_comes_back(stream_norm, tmp_path):
    config = {"stream_norm": stream_norm}
    report = trained(tmp_path, "affine-norm-rigpt", config, optim="equivariant", learning_rate=0.02)
    back = AffineNormForCausalLM.from_pretrained(report.model_folder)
    assert back.config.stream_norm == stream_norm
    assert all(bool((gain != 1).any()) and bool((gain != 0).any()) for gain in norms(back).values())
