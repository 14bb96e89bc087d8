"""Alignment finds the disguise, whatever it is, and the distance between orbits depends on the orbits alone."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.conversion import convert_model
from rigpt_hf.groups import MatrixGroup, assignment, orthogonal
from rigpt_hf.symmetry import GaugeTransformation, align, find_alignment, gauge_distance, gauge_error
from rigpt_hf.symmetry.alignment import check_alike
from rigpt_hf.symmetry.contraction import weights_of
from rigpt_hf.symmetry.local_frames import without_transports
from tests.conversion.sources import gpt2_config, stock_model
from tests.models import SYMMETRIES, noisy, over, tiny_config, tiny_model, tokens
from tests.symmetry.options import SEARCHED, SHALLOW, cases, difference, disguise, generator
from tests.tolerances import DISTANCE, LOCAL_MINIMUM, NOISE, SYMMETRY


def fresh_model(seed: int = 0, **options):
    """As training finds it: biases zero, all heads with the same frequencies."""
    torch.manual_seed(seed)
    return RiGPTForCausalLM(tiny_config(**options)).to(torch.float64).eval()


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_a_disguise_is_recovered(turned, option):
    model, disguised, _ = turned(option)
    found = find_alignment(model, disguised)
    assert found.converged and found.distance == found.distances[-1] <= DISTANCE[torch.float64]
    assert len(found.distances) >= 2 and found.distances[0] > 0.1, "there was nothing to find"
    aligned = found.transformation(model)
    assert difference(aligned, disguised) <= SYMMETRY[torch.float64] < 0.1 < difference(model, disguised)
    assert gauge_error(model, found.transformation, tokens(2, 9)) <= SYMMETRY[torch.float64]


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_a_rounded_disguise_is_near(option):
    model = tiny_model(**SHALLOW[option])
    rounded = disguise(model, 2, dtype=torch.bfloat16)
    assert DISTANCE[torch.float64] < gauge_distance(rounded, model) <= DISTANCE[torch.bfloat16]
    single = tiny_model(dtype=torch.float32, **SHALLOW[option])
    assert gauge_distance(single, disguise(single, 3)) <= DISTANCE[torch.float32]


@over(SEARCHED[:1], SEARCHED)
def test_two_rounded_disguises_are_near(option):
    pair = (disguise(tiny_model(**SHALLOW[option]), seed, dtype=torch.bfloat16) for seed in (4, 5))
    assert gauge_distance(*pair) <= DISTANCE[torch.bfloat16]


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_the_distance_of_a_relative_is_the_noise_between(option):
    model = tiny_model(**SHALLOW[option])
    relative = noisy(model, NOISE)
    found = find_alignment(relative, disguise(model, 6))
    assert found.converged and found.distance == pytest.approx(NOISE, rel=NOISE)
    assert gauge_error(relative, found.transformation, tokens(2, 9)) <= SYMMETRY[torch.float64]
    back_elsewhere = gauge_distance(disguise(model, 7), disguise(relative, 8))
    assert back_elsewhere == pytest.approx(found.distance, rel=LOCAL_MINIMUM)


@over(SEARCHED[1::2], [*SEARCHED, "learned-untied", "untied-projected", "rotary-learned", "squared-distance-partial"])
@pytest.mark.by_default(1)
def test_unrelated_models(option):
    """The distance depends on their orbits alone, every sweep comes nearer, and an alignment is consistent."""
    a, b = (tiny_model(seed, **SHALLOW[option]) for seed in (0, 1))
    found = find_alignment(a, b)
    assert 1.0 < found.distance < found.distances[0]
    assert gauge_error(a, found.transformation, tokens(2, 9)) <= SYMMETRY[torch.float64]
    assert gauge_distance(disguise(b, 10), disguise(a, 9)) == pytest.approx(found.distance, rel=LOCAL_MINIMUM)

    assert len(found.distances) >= 3
    assert all(later <= earlier for earlier, later in itertools.pairwise(found.distances))
    short = find_alignment(a, b, max_sweeps=2)
    assert short.distances == found.distances[:3] and not short.converged
    assert find_alignment(a, b, stop_above=0.5).distances == found.distances[:2]

    aligned = (found.to_balanced @ found.transformation).state_dict(weights_of(a))
    reference = found.to_balanced.state_dict(weights_of(b))
    scale = max(float(weight.abs().max()) for weight in reference.values())
    for key, weight in aligned.items():
        assert (weight - found.aligned[key]).abs().max() <= SYMMETRY[torch.float64] * scale, key
        assert (reference[key] - found.reference[key]).abs().max() <= SYMMETRY[torch.float64] * scale, key
    # Maps between local frames are the identity in both, once balanced, and no part of the distance.
    aligned, reference = without_transports(aligned), without_transports(reference)
    norms = [sum(float(weight.square().sum()) for weight in side.values()) for side in (aligned, reference)]
    squared = sum(float((weight - reference[key]).square().sum()) for key, weight in aligned.items())
    assert found.distance == pytest.approx((squared / (sum(norms) / 2)) ** 0.5)


def test_a_matrix_outside_the_group_is_no_disguise():
    model = tiny_model(num_hidden_layers=2)
    shear = GaugeTransformation.random(model.config, generator(11), ["stream"]).elements["stream"].clone()
    shear[0, 0] *= 1.5
    assert gauge_distance(model, GaugeTransformation(model.config, {"stream": shear})(model), max_sweeps=9) > 1e-3


NARROW = [
    (name, make, vocab_size)
    for name in ("rotary", "rotary-learned", "gated", "untied-projected")
    for make in (tiny_model, fresh_model)
    for vocab_size in (5, 13)
]


@pytest.mark.parametrize(("name", "make", "vocab_size"), cases([NARROW[i] for i in (2, 12)], NARROW))
@pytest.mark.full
def test_tokens_that_do_not_span_the_stream(name, make, vocab_size):
    """The rotation of the stream has to be found from the layers too."""
    model = make(vocab_size=vocab_size, **SHALLOW[name])
    assert vocab_size < model.config.hidden_size
    other = disguise(model, 12)
    assert gauge_distance(model, other) <= DISTANCE[torch.float64]
    assert gauge_distance(other.to(torch.bfloat16), model) <= DISTANCE[torch.bfloat16]


@over(["rotary-learned", "gated-relu2"], ["rotary", "learned", "distance"])
@pytest.mark.by_default(1)
def test_fresh_models(option):
    model = fresh_model(**SHALLOW[option])
    assert gauge_distance(model, disguise(model, 13)) <= DISTANCE[torch.float64]
    assert gauge_distance(disguise(model, 13, dtype=torch.bfloat16), model) <= DISTANCE[torch.bfloat16]
    # Learned frequencies start at the same values, and are the largest weights of a fresh model.
    unrelated = gauge_distance(model, fresh_model(1, **SHALLOW[option]), max_sweeps=5)
    assert unrelated > (0.5 if model.config.rotary_learned_frequencies else 1.0)


@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
@pytest.mark.full
def test_a_converted_gpt2(fresh):
    """Its centred projections leave one direction of token vectors empty, which only exact weights have exactly."""
    torch.manual_seed(0)
    stock = stock_model("gpt2")
    model = convert_model(type(stock)(gpt2_config()).to(torch.float64).eval() if fresh else stock)
    assert gauge_distance(model, disguise(model, 14)) <= DISTANCE[torch.float64]
    if not fresh:
        assert gauge_distance(disguise(model, 14, dtype=torch.bfloat16), model) <= DISTANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vocab_size": 60}, "`vocab_size`, got 61 and 60. Models of different"),
        ({"hidden_size": 64}, "`hidden_size`, got 32 and 64"),
        ({"embedding_size": 24}, "`embedding_size`, got None and 24"),
        ({"intermediate_size": 96}, "`intermediate_size`, got 128 and 96"),
        ({"num_hidden_layers": 2}, "`num_hidden_layers`, got 3 and 2"),
        ({"num_key_value_heads": 4}, "`num_key_value_heads`, got 2 and 4"),
        ({"hidden_act": "relu"}, "`hidden_act`, got 'gelu_pytorch_tanh' and 'relu'. Under another option"),
        ({"attention_bias": False}, "`attention_bias`, got True and False"),
        ({"position_embedding_type": "learned"}, "`position_embedding_type`, got 'rotary' and 'learned'"),
        ({"attention_score": "distance"}, "`attention_score`, got 'dot' and 'distance'"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings`, got True and False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_of_different_shape_are_refused(options, text):
    check_alike(tiny_config(), tiny_config())
    with pytest.raises(ValueError) as error:
        check_alike(tiny_config(), tiny_config(**options))
    assert f"`model` and `reference` must have the same {text}" in str(error.value)
    assert "compare models made from one configuration" in str(error.value)


def test_a_length_that_is_only_promised_may_differ():
    lengths = ({"max_position_embeddings": 64}, {"max_position_embeddings": 128})
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    check_alike(*(tiny_config(**length) for length in lengths))
    for options in ({"position_embedding_type": "learned"}, dynamic):
        with pytest.raises(ValueError, match="the same `max_position_embeddings`, got 64 and 128"):
            check_alike(*(tiny_config(**length, **options) for length in lengths))
    one, other = (tiny_model(**length) for length in lengths)
    assert find_alignment(one, other).distance <= DISTANCE[torch.float64]


def test_aligning_refuses_models_of_different_shape():
    with pytest.raises(ValueError, match="`model` and `reference` must have the same `num_hidden_layers`"):
        align(tiny_model(), tiny_model(num_hidden_layers=2))


class Spinning(RiGPTConfig):
    """With an option that has no parameters and that nobody declared incidental."""

    spin: int = 0


def test_an_option_that_nobody_declared_incidental_is_refused():
    one, other = (Spinning(**tiny_config().to_diff_dict()) for _ in range(2))
    check_alike(one, other)
    other.spin = 1
    with pytest.raises(ValueError, match="must have the same `spin`, got 0 and 1. Under another"):
        check_alike(one, other)
    with pytest.raises(ValueError, match="`spin`"):
        check_alike(tiny_config(), other)
    with pytest.raises(ValueError, match="must have the same `spin`, got 0 in 'here' and 1 in 'there'. Under another"):
        check_alike(one, other, ("here", "there"))
    other.spin, other.attention_dropout = 0, 0.5
    check_alike(one, other)


PLANES = ((0, 3), (1, 4), (2, 5))
GROUPS = {
    "orthogonal": orthogonal(6),
    "free": MatrixGroup(6, "free"),
    "planes": MatrixGroup(6, "none", PLANES),
    "planes-rest": MatrixGroup(9, "free", PLANES),
    "movable": MatrixGroup(6, "free", PLANES, movable=True),
    "movable-rest": MatrixGroup(9, "none", PLANES, movable=True),
    "common": MatrixGroup(6, "common"),
}


def compact(group: MatrixGroup) -> MatrixGroup:
    return MatrixGroup(group.n, "none", group.planes, group.movable)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
def test_nearest_beats_every_other_compact_element(group):
    cross = torch.randn(3, group.n, group.n, generator=generator(15), dtype=torch.float64)
    found = group.procrustes(cross)
    gains = (found * cross).sum(dim=(1, 2))
    assert torch.allclose(gains, group.largest_trace(cross), rtol=SYMMETRY[torch.float64])
    eye = torch.eye(group.n, dtype=torch.float64)
    assert (found @ found.mT - eye).abs().max() <= SYMMETRY[torch.float64]
    others = compact(group).random(500, generator(16))
    best = torch.einsum("gij,cij->gc", others, cross).max(dim=0).values
    assert (gains > best).all() and (best > 0).all()
    # Elements of the group come back as they are: what is found is in the group.
    given = compact(group).random(3, generator(17))
    vectors = torch.randn(group.n, 40, generator=generator(18), dtype=torch.float64)
    assert (group.procrustes(given @ vectors @ vectors.T) - given).abs().max() <= 1e3 * SYMMETRY[torch.float64]
    outside = torch.linalg.qr(cross)[0] if group.planes else 2 * given
    assert (group.procrustes(outside) - outside).abs().max() > 0.1


def test_planes_are_told_apart_by_their_frequencies():
    group = GROUPS["movable"]
    given = compact(group).random(1, generator(19))
    frequencies = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    moved = group.act(given, "planes", frequencies.reshape(3, 1)).reshape(1, 3)
    products = moved[:, :, None] * frequencies[:, None, :]
    nothing = torch.zeros(1, 6, 6, dtype=torch.float64)
    found = group.procrustes(nothing, products)
    assert torch.equal(group.act(found, "planes", frequencies.reshape(3, 1)).reshape(1, 3), moved)
    assert not torch.equal(moved, frequencies)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_assignments_are_those_of_scipy(n):
    hard = 0
    for seed in range(10):
        gains = torch.rand(n, n, generator=generator(seed), dtype=torch.float64)
        if seed % 2:  # every row has its own favourite
            gains[torch.arange(n), torch.randperm(n, generator=generator(seed))] += 1
        expected = torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])
        assert torch.equal(assignment(gains), expected)
        hard += len(gains.argmax(dim=1).unique()) < n
    assert hard >= 2 or n <= 2
