"""Attention scores: by hand, in every backend that can express them, and their gradients."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import flex_attention

from rigpt_hf.scores_rigpt import (
    SCORES,
    Score,
    eager_attention_forward,
    flex_attention_forward,
    squared_distance_as_dot,
)
from rigpt_hf.symmetry import GaugeTransformation, gauge_error
from tests.model.agreement import assert_different, assert_same, difference
from tests.models import tiny_model, tokens
from tests.tolerances import SYMMETRY


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler")


def with_backend(model, name):
    model.set_attn_implementation(name)
    return model


def by_hand(model, layer, hidden_states):
    """Attention of one layer without positions, one query at a time, straight from the formulas."""
    attention = model.model.layers[layer].self_attn
    batch, length, _ = hidden_states.shape
    size, groups = attention.head_dim, attention.num_key_value_groups
    query, key, value = (
        projection(hidden_states).view(batch, length, -1, size)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if model.config.qk_norm:
        query, key = normalised(model, attention.q_norm, query), normalised(model, attention.k_norm, key)
    output = torch.zeros_like(query)
    for head in range(query.shape[2]):
        for position in range(length):
            q = query[:, position, head, None]
            k, v = (x[:, : position + 1, head // groups] for x in (key, value))
            score = (q * k).sum(-1)
            if attention.score.name == "squared_distance":
                score = score - attention.distance_weight[head] * k.square().sum(-1) / 2
            elif attention.score.name == "distance":
                weight = attention.distance_weight[head]
                score = (1 - weight) * score - weight * (q - k).square().sum(-1).sqrt()
            probabilities = (score / size**0.5).softmax(-1)
            output[:, position, head] = (probabilities[..., None] * v).sum(1)
    return attention.o_proj(output.flatten(2))


def normalised(model, norm, x):
    """Queries or keys `[B, S, heads, h]` behind their norm, with its gain."""
    form, mapped = model.config.qk_norm_gain, x
    if form == "metric":
        maps = norm.weight.unflatten(0, (x.shape[2], x.shape[3]))
        mapped = torch.stack([x[:, :, head] @ maps[head].T for head in range(x.shape[2])], dim=2)
    axes = (-2, -1) if model.config.qk_norm_over == "all" else -1
    unit = x / (mapped.square().mean(axes, keepdim=True) + model.config.rms_norm_eps).sqrt()
    if form in ("vector", "vector_per_head"):
        unit = norm.weight.unflatten(0, (-1, x.shape[3])) * unit
    return unit if norm.bias is None else unit + norm.bias.unflatten(0, (-1, x.shape[3]))


def causal_mask(length, dtype):
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)[None, None]


@pytest.mark.parametrize(
    ("heads", "qk_norm", "gain", "over", "bias"),
    [
        (1, True, None, "head", False),
        (2, False, None, "head", False),
        (4, True, None, "head", True),
        (2, True, "vector", "head", False),
        (2, True, "vector_per_head", "head", True),
        (2, True, "metric", "head", False),
        (2, True, None, "all", False),
        (2, True, "vector", "all", True),
        (1, True, "metric", "all", False),
    ],
)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_its_formula(score, heads, qk_norm, gain, over, bias):
    norms = {"qk_norm": qk_norm, "qk_norm_gain": gain, "qk_norm_over": over, "qk_norm_bias": bias}
    model = tiny_model(attention_score=score, num_key_value_heads=heads, **norms)
    hidden_states, attention = torch.randn(2, 7, 32, dtype=torch.float64), model.model.layers[1].self_attn
    expected, mask = by_hand(model, 1, hidden_states), causal_mask(7, torch.float64)
    for backend in ("eager",) if score == "distance" else ("eager", "sdpa"):
        with_backend(model, backend)
        assert_same(attention(hidden_states, attention_mask=mask)[0], expected, f"{score} in {backend}")
    if gain is not None:
        attention.q_norm.weight.data += 0.1
        assert_different(by_hand(model, 1, hidden_states), expected)
        attention.q_norm.weight.data -= 0.1
    if bias:
        attention.q_norm.bias.data[:3] += 0.1
        assert_different(by_hand(model, 1, hidden_states), expected)
        attention.q_norm.bias.data[:3] -= 0.1
    if score != "dot" and (not qk_norm or gain in ("vector", "vector_per_head")):  # keys of one norm know no weight
        attention.distance_weight.data += 0.1
        assert_different(by_hand(model, 1, hidden_states), expected)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler and the library's use of it
@pytest.mark.full
@pytest.mark.parametrize("score", SCORES)
def test_flex_agrees_with_eager(score):
    model = tiny_model(dtype=torch.float32, attention_score=score, head_dim=16)
    input_ids = tokens(2, 11)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = with_backend(model, "eager")(input_ids, attention_mask=mask).logits
        actual = with_backend(model, "flex_attention")(input_ids, attention_mask=mask).logits
    assert_same(actual[mask.bool()], expected[mask.bool()])


def without_compiling(query, key, value, score_mod, block_mask, scale, enable_gqa, **_):
    """What FlexAttention computes, from the same score modification."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    dot = scale * query @ key.transpose(2, 3)
    indices = torch.meshgrid(*map(torch.arange, dot.shape), indexing="ij")
    return (score_mod(dot, *indices) + block_mask).softmax(-1) @ value


def test_the_score_modification_of_flex_is_the_eager_score(monkeypatch):
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", without_compiling)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    module = SimpleNamespace(
        num_key_value_groups=2,
        score=SCORES["distance"],
        distance_weight=torch.randn(4),
        alibi=None,
        training=False,
    )
    arguments = (module, query, key, value, causal_mask(5, torch.float32), 0.3)
    assert_same(flex_attention_forward(*arguments)[0], eager_attention_forward(*arguments)[0])


def test_flex_refuses_dropout_in_training():
    model = with_backend(tiny_model(dtype=torch.float32, attention_score="distance", attention_dropout=0.1), "eager")
    attention = model.model.layers[0].self_attn.train()
    attention.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="`attention_dropout` must be 0 to train with 'flex_attention', got 0.1"):
        attention(torch.randn(1, 3, 32))


def as_dot_product(model):
    """The model with the dot product and the same weights otherwise."""
    plain = with_backend(tiny_model(), model.config._attn_implementation)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "distance_weight" not in k})
    return plain


def test_weight_zero_is_the_dot_product():
    for score, backend in (("squared_distance", "eager"), ("squared_distance", "sdpa"), ("distance", "eager")):
        model = with_backend(tiny_model(attention_score=score), backend)
        for layer in model.model.layers:
            layer.self_attn.distance_weight.data.zero_()
        plain = as_dot_product(model)
        assert difference(model(tokens(2, 11)).logits, plain(tokens(2, 11)).logits) <= 1e-14
        model.model.layers[0].self_attn.distance_weight.data.fill_(0.3)
        assert_different(model(tokens(2, 11)).logits, plain(tokens(2, 11)).logits)


def test_weight_one_attends_by_squared_distance():
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    q, k, v = squared_distance_as_dot(query, key, value, torch.ones(2, dtype=torch.float64))
    assert q.shape[-1] % 8 == k.shape[-1] % 8 == v.shape[-1] % 8 == 0
    expected = (-(query[..., :, None, :] - key[..., None, :, :]).square().sum(-1) / 2).softmax(-1)
    assert_same((q @ k.transpose(2, 3)).softmax(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_squared_norm_survives_rounding_to_16_bits(dtype):
    key = torch.randn(1, 2, 64, 64).to(dtype)
    query = torch.zeros_like(key)
    q, k, _ = squared_distance_as_dot(query, key, key, torch.ones(2))
    exact = -key.double().square().sum(-1) / 2
    scores = (q.double() @ k.double().transpose(2, 3))[..., 0, :]
    rounded = exact.to(dtype).double()
    assert (scores - exact).abs().max() < 0.02 * (rounded - exact).abs().max()


@pytest.mark.parametrize("score", ["squared_distance", "distance"])
def test_the_weight_has_the_gradient_of_finite_differences(score):
    model = with_backend(tiny_model(attention_score=score, num_hidden_layers=2), "eager")
    weight = model.model.layers[0].self_attn.distance_weight

    def loss(value):
        weight.data.copy_(value)
        return torch.func.functional_call(
            model, {"model.layers.0.self_attn.distance_weight": value}, (tokens(2, 7),), {"labels": tokens(2, 7)}
        ).loss

    assert torch.autograd.gradcheck(loss, (weight.detach().clone().requires_grad_(),))


def test_the_distance_of_equal_vectors_has_a_gradient():
    model = with_backend(tiny_model(attention_score="distance"), "eager")
    for layer in model.model.layers:  # one key-value head's query equals its key at every position
        layer.self_attn.q_proj.weight.data[:16] = layer.self_attn.k_proj.weight.data
        layer.self_attn.q_proj.bias.data[:16] = layer.self_attn.k_proj.bias.data
    model(tokens(2, 7), labels=tokens(2, 7)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_switching_the_backend_keeps_the_score():
    for score in SCORES:
        model = with_backend(tiny_model(attention_score=score), "eager")
        expected = model(tokens(2, 11)).logits
        if score != "distance":
            with_backend(model, "sdpa")
        assert_same(with_backend(model, "eager")(tokens(2, 11)).logits, expected)
        if score != "dot":
            assert_different(as_dot_product(model)(tokens(2, 11)).logits, expected)


def test_a_score_is_one_record(monkeypatch):
    """The config, the model, its backends, its cache and its plan know a score by its entry alone."""

    def modify(dot, query_norm, key_norm, weight):
        return dot - weight * (query_norm * key_norm).sqrt()

    backends = {"eager": eager_attention_forward}
    score = Score("product", True, stretch="none", key_shift="never", modify=modify, backends=backends)
    with pytest.raises(
        ValueError, match="`attention_score` must be one of dot, squared_distance, distance, got 'prod"
    ):
        tiny_model(attention_score="product")
    monkeypatch.setitem(SCORES, "product", score)
    model = tiny_model(attention_score="product")
    assert model.config._attn_implementation == "eager"
    assert model.config.base_model_tp_plan["layers.*.self_attn.distance_weight"] == "colwise"
    with pytest.raises(ValueError, match="must be one of eager for `attention_score='product'`, which is no dot"):
        model.set_attn_implementation("sdpa")
    expected = model(tokens(2, 9)).logits
    cache = model(tokens(2, 9)[:, :5]).past_key_values
    assert_same(model(tokens(2, 9)[:, 5:], past_key_values=cache).logits, expected[:, 5:])
    for layer in model.model.layers:
        layer.self_attn.distance_weight.data.zero_()
    plain = as_dot_product(model)
    assert_same(model(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)
    assert_different(expected, plain(tokens(2, 9)).logits)
    # And the table of frames reads from it what may be done to queries and keys.
    for record, known in ((score, True), (replace(score, name="misread", stretch="free"), False)):
        monkeypatch.setitem(SCORES, record.name, record)
        model = tiny_model(attention_score=record.name, position_embedding_type="learned")
        g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "all")
        assert (gauge_error(model, g, tokens(2, 9)) <= SYMMETRY[torch.float64]) is known
