"""What gains behind the normalisation of queries and keys leave of the frames of heads, and what they bring along."""

import pytest
import torch

from rigpt_hf.groups import GainScalings, HalfTurns
from rigpt_hf.symmetry import (
    GaugeTransformation,
    align,
    canonicalize,
    charges,
    gauge_distance,
    redundant_dimensions,
    table_of,
)
from rigpt_hf.table import FrameKey
from tests.models import (
    GAIN_METRIC,
    GAIN_PER_HEAD,
    GAIN_VECTOR,
    NORM_BIAS,
    PARTIAL,
    TOGETHER,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.symmetry.options import disguise, generator
from tests.tolerances import DISTANCE, PAIRING, SYMMETRY


@torch.no_grad()
def apart(model, state) -> float:
    """By how much logits change with other weights, relative."""
    before = model(tokens(2, 9)).logits
    other = type(model)(model.config).to(torch.float64).eval()
    other.load_state_dict(state)
    return float((other(tokens(2, 9)).logits - before).abs().max() / before.abs().max())


def turned_as_without_gain(model) -> dict[str, torch.Tensor]:
    """The weights after a rotation of heads that would be right if their norms had no gain."""
    config = tiny_config(qk_norm=True, **({"position_embedding_type": "learned"} if learned(model) else {}))
    g = GaugeTransformation.random(config, generator(1), ["head_qk"])
    return g.state_dict(model.state_dict())


def learned(model) -> bool:
    return model.config.position_embedding_type == "learned"


positions = pytest.mark.parametrize(
    "positions", [{}, {"position_embedding_type": "learned"}], ids=["rotary", "learned"]
)


@positions
@pytest.mark.parametrize("over", ["head", "all"])
@pytest.mark.parametrize("gain", [{}, GAIN_VECTOR, GAIN_METRIC], ids=["none", "vector", "metric"])
def test_heads_do_not_turn_past_a_gain(gain, over, positions):
    """The control that says why the group is smaller; and a metric that does not turn along is no better."""
    model = tiny_model(**({"qk_norm": True, "qk_norm_over": over} | gain | positions))
    error = apart(model, turned_as_without_gain(model))
    assert error > 0.01 if gain else error <= SYMMETRY[torch.float64]
    g = GaugeTransformation.random(model.config, generator(1), "all")
    assert apart(model, g.state_dict(model.state_dict())) <= SYMMETRY[torch.float64]


@positions
@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_metric_turns_as_what_it_measures(norm, positions):
    """Queries are vectors, so the map that measures them has covectors for rows; for keys it is the other way."""
    model = tiny_model(**GAIN_METRIC, **positions)
    g = GaugeTransformation.random(model.config, generator(1), ["head_qk"])
    state = g.state_dict(model.state_dict())
    assert apart(model, state) <= SYMMETRY[torch.float64]
    inverse = g.inverse()
    for name, tensor in model.state_dict().items():
        if norm in name:
            left = state | {name: tensor}
            wrong = state | {name: inverse.transform(name, tensor)}
            assert min(apart(model, each) for each in (left, wrong)) > 1e-3, name


def test_what_remains_of_the_heads_of_a_vector():
    config = tiny_config(**GAIN_VECTOR, **PARTIAL)
    kinds = table_of(config).kinds
    assert kinds["head_qk"].group == HalfTurns(8, ((0, 2), (1, 3))) and str(kinds["head_qk"].group) == "{1,-1}^6"
    without, vector, metric = (
        redundant_dimensions(tiny_config(qk_norm=True, **gain, **PARTIAL))
        for gain in ({}, {"qk_norm_gain": "vector"}, {"qk_norm_gain": "metric"})
    )
    layers, heads, h = 3, 2, 8
    assert without["head_qk"] == layers * heads * (2 + 4 * 3 // 2)
    assert (vector["head_qk"], vector["gains"]) == (0, layers * 6)
    assert metric["head_qk"] == layers * heads * (2 * 2 + 4 * 4)
    assert metric["query_norm"] + metric["key_norm"] == layers * (4 + heads) * h * (h - 1) // 2


@pytest.mark.parametrize("options", [GAIN_PER_HEAD, TOGETHER | GAIN_VECTOR], ids=["per-head", "together"])
def test_heads_have_gains_of_their_own(options):
    config = tiny_config(**(options | PARTIAL))
    gains = table_of(config).kinds["gains"]
    assert (gains.copies, gains.group) == (2, GainScalings(8, "free", ((0, 2), (1, 3)), repeats=2))
    assert redundant_dimensions(config)["gains"] == 3 * 2 * 6
    model = tiny_model(**options)
    attention = model.model.layers[1].self_attn
    assert attention.q_norm.weight.shape == (32,) and attention.k_norm.weight.shape == (16,)
    # One factor for a query head and its key-value head, and one for two query heads that share one.
    one = {FrameKey("gains", 1): gains.group.identity(2)}
    one[FrameKey("gains", 1)][1] = torch.tensor([[2.0], [2.0], [0.5]])
    single = {FrameKey("gains", 1): one[FrameKey("gains", 1)].clone()}
    single[FrameKey("gains", 1)][1, 0] = 1.0
    for elements, same in ((one, True), (single, False)):
        g = GaugeTransformation(model.config, elements)
        assert (apart(model, g.state_dict(model.state_dict())) <= SYMMETRY[torch.float64]) == same


@pytest.mark.parametrize(
    "gain", [GAIN_VECTOR, GAIN_PER_HEAD, GAIN_METRIC, {}], ids=["vector", "own", "metric", "none"]
)
@pytest.mark.parametrize("norm, frame", [("q_norm", "head_qk"), ("k_norm", "gains"), ("k_norm", "heads")])
def test_a_bias_behind_a_norm_turns_with_what_it_is_added_to(norm, frame, gain):
    """With its head, with the sizes of gains and not with their signs, and with the order of heads."""
    model = tiny_model(**(NORM_BIAS | gain | PARTIAL))
    kinds = table_of(model.config).kinds
    if frame not in kinds:
        assert frame == "gains" and gain in (GAIN_METRIC, {})
        return
    g = GaugeTransformation.random(model.config, generator(1), [frame])
    before, after = model.state_dict(), g.state_dict(model.state_dict())
    assert apart(model, after) <= SYMMETRY[torch.float64]
    left = {name: before[name] for name in before if name.endswith(f"{norm}.bias")}
    assert len(left) == 3 and apart(model, after | left) > 1e-3


@pytest.mark.parametrize("score", ["dot", "squared_distance"])
def test_a_constant_of_all_keys_is_one_behind_their_norm(score):
    """Where positions leave it alone; in front of the norm there is none, and without a bias neither."""
    options = {"attention_score": score} | PARTIAL
    model = tiny_model(**NORM_BIAS, **options)
    shift = table_of(model.config).kinds["key_shift"]
    assert shift.group.free == (4, 5, 6, 7) and all("norm.bias" in name for name in shift.shift.moves)
    g = GaugeTransformation.random(model.config, generator(1), ["key_shift"])
    state = g.state_dict(model.state_dict())
    assert apart(model, state) <= SYMMETRY[torch.float64]
    moved = [name for name, tensor in state.items() if not torch.equal(tensor, model.state_dict()[name])]
    assert len(moved) == 3 * (1 if score == "dot" else 2) and all("norm.bias" in name for name in moved)
    in_front = {name: model.state_dict()[name] + 0.3 for name in state if name.endswith("k_proj.bias")}
    assert apart(model, model.state_dict() | in_front) > 1e-3
    assert "key_shift" not in table_of(tiny_config(qk_norm=True, **options)).kinds


def test_the_charges_of_gains_by_hand():
    model = tiny_model(**GAIN_VECTOR, **PARTIAL)
    found, attention = charges(model)["layers.1.gains"][0], model.model.layers[1].self_attn
    squares = [norm.weight.detach().square() for norm in (attention.q_norm, attention.k_norm)]
    expected = [
        sum(sign * s[list(d)].sum() for sign, s in zip((1, -1), squares, strict=True))
        for d in ((0, 2), (1, 3), (4,), (5,), (6,), (7,))
    ]
    assert (found - torch.stack(expected)).abs().max() <= PAIRING
    for bias in ({}, NORM_BIAS):
        model = tiny_model(**(GAIN_VECTOR | bias), attention_score="squared_distance")
        found, attention = charges(model)["layers.1.gains"][0], model.model.layers[1].self_attn
        q, k, weight = (
            sum(p.detach().square().sum() for p in of)
            for of in (attention.q_norm.parameters(), attention.k_norm.parameters(), [attention.distance_weight])
        )
        assert weight > 1e-3 and abs(float(found) - float(q - k + 2 * weight)) <= PAIRING


def test_the_canonical_form_has_positive_gains_that_are_balanced():
    model = disguise(tiny_model(**GAIN_VECTOR))
    assert any((norm < 0).any() for name, norm in model.named_parameters() if "_norm" in name)
    for layer in canonicalize(model).model.layers:
        queries, keys = layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight
        assert min(queries.min(), keys.min()) > 0
        gap = (queries.square() - keys.square()).unflatten(0, (2, 4)).sum(0)
        assert gap.abs().max() <= SYMMETRY[torch.float64] < queries.square().max()


@pytest.mark.full
def test_rows_behind_a_gain_of_zero_are_aligned_too():
    """There the gain says nothing about the sign that its rows have."""
    model = tiny_model(**GAIN_VECTOR)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight[3] = 0
        model.model.layers[1].self_attn.k_norm.weight[5] = 0
    for seed in range(3):
        other = disguise(model, seed)
        assert gauge_distance(other, model) <= DISTANCE[torch.float64]
        back = align(other, model)(other)
        rows = [each.model.layers[0].self_attn.q_proj.weight for each in (back, model)]
        assert (rows[0] - rows[1]).abs().max() <= 1e3 * DISTANCE[torch.float64] * rows[1].abs().max()
