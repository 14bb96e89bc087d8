"""The initial law: its standard deviations, and that it prefers no basis."""

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTForCausalLM, RiGPTForSequenceClassification
from tests.models import tiny_config


STD = 0.05


def fresh_model(**options) -> RiGPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "vocab_size": 500, "num_hidden_layers": 8, "initializer_range": STD}
    return RiGPTForCausalLM(tiny_config(**(sizes | options)))


def made_on_meta(**options) -> RiGPTForCausalLM:
    torch.manual_seed(0)
    return RiGPTForCausalLM.from_pretrained(None, config=fresh_model(**options).config, state_dict={})


# What writes to the residual stream is smaller, so that the sum of 2·layers writers is not.
EXPECTED = {
    "embed_tokens": STD,
    "embed_positions": STD,
    "q_proj": STD,
    "k_proj": STD,
    "v_proj": STD,
    "o_proj": STD / 4,
    "gate_proj": STD,
    "up_proj": STD,
    "down_proj": STD / 4,
    "lm_head": STD,
}


@pytest.mark.parametrize("make", [fresh_model, made_on_meta])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_standard_deviations(make, tied):
    model = make(position_embedding_type="learned", gated_mlp=True, tie_word_embeddings=tied)
    seen = set()
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
            continue
        assert abs(parameter.std() / EXPECTED[module] - 1) < 0.06, f"{name} has {parameter.std():.4f}"
        assert abs(parameter.mean()) < 0.1 * EXPECTED[module], name
        seen.add(module)
    assert seen == set(EXPECTED) - ({"lm_head"} if tied else set())
    classifier = RiGPTForSequenceClassification(tiny_config(hidden_size=512, num_labels=20, initializer_range=STD))
    assert abs(classifier.score.weight.std() / STD - 1) < 0.06


@pytest.mark.parametrize("make", [fresh_model, made_on_meta])
@pytest.mark.parametrize("lexical", [96, 128, 160], ids=["narrower", "as-wide", "wider"])
def test_maps_between_frames_are_orthogonal(make, lexical):
    model = make(embedding_size=lexical, output_bias=True)
    for weight in (model.model.project_in.weight, model.model.project_out.weight):
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert (model.model.project_out.bias == 0).all()
    model = RiGPTForCausalLM._from_config(tiny_config(embedding_size=24), dtype=torch.bfloat16)
    weight = model.model.project_in.weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float().T @ weight.float(), torch.eye(24), atol=0.02, rtol=0)


@pytest.mark.parametrize("make", [fresh_model, made_on_meta])
def test_scores_start_at_the_dot_product_and_frequencies_at_the_configured_ones(make):
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    model = make(attention_score="squared_distance", rotary_learned_frequencies=True, rope_parameters=rope)
    half = model.config.head_dim // 2
    expected = 1000.0 ** (-torch.arange(half) / half)
    for layer in model.model.layers:
        assert (layer.self_attn.distance_weight == 0).all()
        torch.testing.assert_close(layer.self_attn.rotary_frequencies, expected.expand(2, half))


def excess_kurtosis(sample: torch.Tensor) -> float:
    sample = sample.double().flatten()
    sample = (sample - sample.mean()) / sample.std()
    return (sample**4).mean().item() - 3


def test_the_law_is_gaussian_hence_the_same_in_every_basis():
    """Independent entries have a rotation invariant law only if they are Gaussian (Maxwell)."""
    model = fresh_model(position_embedding_type="learned", gated_mlp=True)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert len(weights) > 20
    for name, weight in weights.items():
        tolerance = 5 * (24 / weight.numel()) ** 0.5
        assert abs(excess_kurtosis(weight)) < tolerance, name
        # Singular values are what a rotation cannot change; entries of a rotated weight have the same law.
        rotation = torch.linalg.qr(torch.randn(weight.shape[1], weight.shape[1])).Q
        assert abs(excess_kurtosis(weight @ rotation)) < tolerance, name
    uniform = nn.Linear(128, 512).weight
    assert abs(excess_kurtosis(uniform)) > 20 * (24 / uniform.numel()) ** 0.5, "the check would not see a uniform law"


@pytest.mark.full
def test_the_orthogonal_law_is_haars():
    """First entries of Haar-orthogonal matrices are symmetric with mean square 1/n; a QR without signs is not."""
    entries = []
    for seed in range(200):
        torch.manual_seed(seed)
        config = tiny_config(embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=5)
        entries.append(RiGPTForCausalLM(config).model.project_in.weight[0, 0].item())
    entries = torch.tensor(entries)
    assert abs(entries.mean()) < 0.1 and abs(entries.square().mean() - 1 / 8) < 0.05
    assert 0.35 < (entries > 0).float().mean() < 0.65


def test_the_flag_of_writers_is_on_the_leaf_that_the_library_initialises():
    """A branch on a container would be skipped without a word."""
    model = fresh_model()
    writers = {name for name, module in model.named_modules() if getattr(module, "writes_to_residual", False)}
    assert writers == {f"model.layers.{i}.{name}" for i in range(8) for name in ("self_attn.o_proj", "mlp.down_proj")}
    for name in writers:
        assert next(model.get_submodule(name).parameters()) is not None
