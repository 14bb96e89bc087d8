"""Weight decay picks the balanced point of an orbit: along the orbit alone, and in training whatever the loss is."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from rigpt_hf.flow.gauge_fixing import (
    balance_distance,
    compact_part,
    decay_direction,
    follow_decay,
    least_translations,
    minimum_norm,
    next_token_loss,
)
from rigpt_hf.pictures import encoded
from rigpt_hf.pictures import gauge_fixing as pictures
from rigpt_hf.pictures.gauge_fixing import toy_model, toy_text
from rigpt_hf.symmetry import (
    FrameKey,
    GaugeTransformation,
    canonicalize,
    charges,
    gauge_error,
    gradient_pairing,
    table_of,
)
from rigpt_hf.symmetry.contraction import View, weights_of
from tests.models import SYMMETRIES, over, tiny_model, tokens
from tests.symmetry.options import generator
from tests.tolerances import BALANCE, ORDER, PAIRING, SYMMETRY


# Every kind of stretch: GL of heads and tokens (tied and not), planes, one common factor, every scaling of neurons.
STRETCHED = [
    "learned",
    "learned-projected",
    "learned-untied-projected",
    "rotary-partial",
    "rotary-learned",
    "squared-distance",
    "qk-norm",
    "relu",
    "relu2",
    "gated",
    "gated-relu2",
    "no-biases",
]
# One of each for the searches, which take a second.
SEARCHED = ["learned-untied-projected", "squared-distance", "gated-relu2"]
TOLERANCE = SYMMETRY[torch.float64]
TIME, DECAY, LEARNING_RATES = 1.0, 0.5, (0.02, 0.01)


def model_of(name: str):
    return tiny_model(num_hidden_layers=1, **({"intermediate_size": 48} | SYMMETRIES[name]))


def small_model(name: str):
    """Of half the width."""
    options = SYMMETRIES[name] | ({"embedding_size": 12} if "embedding_size" in SYMMETRIES[name] else {})
    return tiny_model(num_hidden_layers=1, **(options | {"hidden_size": 16, "intermediate_size": 24}))


def norm(weights) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in weights.values()))


def stretching(config) -> set[str]:
    return {kind for kind, frame in table_of(config).kinds.items() if frame.group.stretches}


def stretch_charge(model) -> float:
    shifts = set(map(str, table_of(model.config).shifts))
    return norm({key: q for key, q in charges(model).items() if key not in shifts})


@over(SEARCHED, STRETCHED)
@pytest.mark.by_default(1)
def test_weight_decay_along_the_orbit_ends_at_the_balanced_form(option):
    model = model_of(option)
    start = GaugeTransformation.random(model.config, generator(1), "all")(model)
    assert balance_distance(start) > 0.1, "the start is balanced already"
    reached, report = minimum_norm(start)
    canonical = canonicalize(model)
    least = norm(weights_of(canonical))
    assert abs(report.norm - least) <= BALANCE * least and abs(report.canonical_norm - least) <= BALANCE * least
    assert abs(norm(weights_of(reached)) - least) <= BALANCE * least
    assert all(later < earlier * (1 + BALANCE) for earlier, later in pairwise(report.norms)), "the norm rose"
    assert report.norms[0] > 1.01 * least
    assert report.distance <= TOLERANCE and balance_distance(reached) <= TOLERANCE
    # Rotations are not fixed by decay: entry by entry the two differ.
    assert norm({key: tensor - weights_of(reached)[key] for key, tensor in weights_of(canonical).items()}) > 0.1
    assert stretch_charge(reached) <= BALANCE * least**2 < 1e-3 * stretch_charge(start)
    assert gauge_error(start, report.transformation, tokens(2, 9)) <= TOLERANCE


@over(SEARCHED[2:], STRETCHED)
def test_two_starts_reach_one_point_up_to_rotations(option):
    model = model_of(option)
    first, second = (GaugeTransformation.random(model.config, generator(seed), "all") for seed in (1, 2))
    (one, to_one), (two, to_two) = (minimum_norm(g(model)) for g in (first, second))

    def apart(relation, a, b) -> float:
        turned, target = weights_of(compact_part(relation)(a)), weights_of(b)
        return norm({key: turned[key] - target[key] for key in target}) / norm(target)

    between = second @ first.inverse()
    assert apart(between, first(model), second(model)) > 0.1, "the starts differ by a rotation only"
    relation = to_two.transformation @ between @ to_one.transformation.inverse()
    assert apart(relation, one, two) <= TOLERANCE


def test_the_distance_sees_stretches_and_not_rotations():
    balanced = canonicalize(model_of("no-biases"))
    config = balanced.config
    turned = GaugeTransformation.random(config, generator(1), "all", compact=True)(balanced)
    stretched = GaugeTransformation.random(config, generator(1), stretching(config), special=True)(balanced)
    assert balance_distance(turned) <= TOLERANCE
    assert balance_distance(stretched) > 0.1


def test_the_compact_part_of_what_keeps_lengths_is_itself():
    model = model_of("gated-relu2")
    compact = GaugeTransformation.random(model.config, generator(3), "all", compact=True)
    general = GaugeTransformation.random(model.config, generator(3), "all")
    for g, same in ((compact, True), (general, False)):
        before, after = (weights_of(h(model)) for h in (g, compact_part(g)))
        difference = norm({key: before[key] - after[key] for key in before}) / norm(before)
        assert (difference <= TOLERANCE) == same
        kept = [abs(norm({0: after[key]}) / norm({0: weight}) - 1) for key, weight in weights_of(model).items()]
        assert max(kept) <= TOLERANCE and len(kept) >= 10


@over(SEARCHED, STRETCHED)
def test_the_direction_is_the_projection_of_decay_on_the_orbit(option):
    """What is left of -θ once Xθ is taken away is orthogonal to the motion under every stretch."""
    model = small_model(option)
    config, weights = model.config, weights_of(model)
    keys = {key: frame for key, frame in table_of(config).frames.items() if frame.group.stretches}
    names = list(weights)

    def motion(algebra) -> dict[str, torch.Tensor]:
        """The derivative of exp(tX)θ at t = 0."""

        def moved(t):
            elements = {key: keys[key].group.exp(t * x) for key, x in algebra.items()}
            state = GaugeTransformation(config, elements).state_dict(weights)
            return tuple(state[name] for name in names)

        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return dict(zip(names, torch.autograd.functional.jvp(moved, zero, one)[1], strict=True))

    direction, _ = decay_direction(config, weights)
    assert set(direction) == set(keys)
    along = motion(direction)
    left = {name: -weights[name] - along[name] for name in names}
    for seed in range(3):
        other = {}
        for key, x in direction.items():
            draw = torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
            other[key] = keys[key].group.project(draw)
        tangent = motion(other)
        size = norm(tangent) * norm(weights)
        assert abs(sum(float((tangent[name] * left[name]).sum()) for name in names)) <= PAIRING * size
        # Without the projection it is not, and the projection is not all of -θ.
        assert abs(sum(float((tangent[name] * weights[name]).sum()) for name in names)) > 1e-5 * size
    assert 1e-3 < norm(along) / norm(weights) < 0.9


def test_decay_along_the_orbit_forgets_charges_as_training_does():
    errors = []
    for step in (0.04, 0.02):
        report = minimum_norm(toy_model(), step=step, tolerance=0.01)[1]
        assert report.times[-1] > 0.8 and report.charges[-1] < 0.2
        pairs = zip(report.times, report.charges, strict=True)
        errors.append(max(abs(charge - math.exp(-2 * t)) for t, charge in pairs if t < 0.81))
    assert abs(errors[0] / errors[1] - 2) <= 2 * ORDER and 1e3 * PAIRING < errors[1] < 0.02


@over(["learned", "parallel"], ["squared-distance", "learned-untied-projected", "parallel-mlp-bias"])
@pytest.mark.by_default(1)
def test_the_least_norm_of_translations_is_not_at_zero(option):
    model = small_model(option)
    disguised = GaugeTransformation.random(model.config, generator(1), "all")(model)
    reached, report = minimum_norm(model, translations="least")
    _, other = minimum_norm(disguised, translations="least")
    assert report.norm < report.canonical_norm * (1 - 1e-4), "the canonical form is as short"
    assert report.distance > 1e-3
    assert abs(other.norm - report.norm) <= TOLERANCE * report.norm
    assert gauge_error(model, report.transformation, tokens(2, 9)) <= TOLERANCE
    assert balance_distance(reached, translations="least") <= TOLERANCE

    def square(model):
        return sum(parameter.square().sum() for parameter in model.parameters()) / 2

    # The norm is at rest under every generator there, and not under translations in the canonical form.
    at_rest, canonical = gradient_pairing(reached, square), gradient_pairing(canonicalize(model), square)
    assert max(pairing.relative for pairing in at_rest.values()) <= PAIRING
    moved = {FrameKey.parse(key).kind for key, pairing in canonical.items() if pairing.relative > 1e-4}
    assert moved and moved <= {"key_shift", "value_shift", "residual_shift", "position_shift"}


@over(["learned", "parallel"], ["squared-distance", "learned-untied-projected", "parallel-mlp-bias"])
def test_one_step_finds_the_least_translations(option):
    """Also where several of them move one bias."""
    model = small_model(option)
    moved = least_translations(model.config, weights_of(model))(model)

    def square(model):
        return sum(parameter.square().sum() for parameter in model.parameters()) / 2

    keys = [str(key) for key in table_of(model.config).shifts]
    pairings, before = gradient_pairing(moved, square), gradient_pairing(model, square)
    assert max(pairings[key].relative for key in keys) <= PAIRING
    assert min(before[key].relative for key in keys) > 1e-4


def test_without_translations_the_two_settings_are_one():
    model = model_of("no-biases")
    assert not table_of(model.config).shifts
    zero, least = (minimum_norm(model, translations=at)[1] for at in ("zero", "least"))
    assert abs(zero.norm - least.norm) <= BALANCE * zero.norm and least.distance <= TOLERANCE


def test_an_orbit_without_a_least_norm_is_refused():
    with pytest.raises(ValueError, match="`model` must have an orbit .* directions in 'lexical' that only one of two"):
        minimum_norm(model_of("untied-projected"))


def deviations(model, batches, rate, **options):
    trained, record = follow_decay(
        model, batches, rate, options.pop("decay", DECAY), round(TIME / rate), 25, **options
    )
    return trained, record


def two_batches() -> list[torch.Tensor]:
    return [tokens(4, 12, seed=seed) for seed in range(2)]


@over(["learned"], ["relu2"])
def test_charges_decay_at_the_predicted_rate_in_training(option):
    model, batches = small_model(option), two_batches()
    runs = [deviations(model, batches, rate)[1] for rate in LEARNING_RATES]
    assert set(runs[0].charges) >= {"head_qk", "head_vo"} and runs[0].times[-1] == pytest.approx(TIME)
    for kind, coarse in runs[0].deviations.items():
        fine = runs[1].deviations[kind]
        rate = 1 if kind == "key_shift" else 2
        assert runs[1].predicted[kind][-1] == pytest.approx(math.exp(-rate * DECAY * TIME))
        assert abs(coarse[-1] / fine[-1] - 2) <= 2 * ORDER, kind
        assert fine[-1] < 0.02 < 1 - runs[1].charges[kind][-1], kind
    assert runs[1].losses[-1] < runs[1].losses[0]


def test_without_decay_charges_stay_and_adam_does_as_it_likes():
    model, batches = small_model("relu2"), two_batches()
    plain = deviations(model, batches, LEARNING_RATES[0], decay=0.0)[1]
    adam = deviations(model, batches, LEARNING_RATES[0], optimizer=torch.optim.AdamW)[1]
    assert set(plain.charges) == {"head_qk", "head_vo", "neurons"}
    for kind in ("head_qk", "head_vo", "neurons"):
        assert plain.predicted[kind] == [1.0] * len(plain.times)
        assert plain.deviations[kind][-1] < 0.01
        assert adam.deviations[kind][-1] > 0.2, kind


def test_the_law_does_not_depend_on_the_loss():
    model, batches = small_model("relu2"), two_batches()

    def cubic(model, batch):
        return model(batch, use_cache=False).logits.pow(3).mean() / 10

    def hidden(model, batch):
        return 10 * model.model(batch).last_hidden_state[..., 0].square().mean() + sum(
            layer.self_attn.v_proj.weight.square().sum() for layer in model.model.layers
        )

    start = weights_of(model)
    ends = {}
    for loss in (None, cubic, hidden):
        trained, record = deviations(model, batches, LEARNING_RATES[0], loss=loss)
        ends[loss] = {key: weight - start[key] for key, weight in weights_of(trained).items()}
        if loss is hidden:
            assert record.deviations["head_vo"][-1] > 0.1, "a loss that sees the values themselves obeys the law"
        else:
            assert max(values[-1] for values in record.deviations.values()) < 0.02
    difference = norm({key: change - ends[cubic][key] for key, change in ends[None].items()})
    assert difference > 0.05 * norm(ends[None]), "both losses lead to the same weights"


@pytest.mark.full
def test_training_with_decay_balances_and_training_without_does_not():
    model, text = toy_model(), [toy_text()]
    gaps = {}
    for decay in (0.2, 0.0):
        before = copy.deepcopy(model.state_dict())
        trained, record = follow_decay(model, text, 0.05, decay, 120, 60)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        gaps[decay] = [a**2 - b**2 for a, b in zip(record.norms, record.balanced_norms, strict=True)]
        assert len(record.times) == 3 and min(gaps[decay]) > 0
        assert record.distances[-1] == pytest.approx(balance_distance(trained))
        assert record.balanced_norms[-1] == pytest.approx(norm(weights_of(canonicalize(trained))))
        assert record.losses[-1] < 0.9 * record.losses[0]
    assert gaps[0.2][-1] < 0.2 * gaps[0.2][0]
    assert gaps[0.0][-1] > 0.7 * gaps[0.0][0]


def test_nothing_but_decay_acts_on_the_length_of_what_writes_into_the_stream():
    """Why a training with decay does not come to rest: the gradient has no part along the weights of writers."""
    model = toy_model()  # its tokens live in a frame of their own, so that everything that writes does nothing else
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-30
    loss = next_token_loss(model, toy_text())
    gradient = dict(zip(weights_of(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    state = weights_of(model)
    pairing = View(table_of(model.config), (FrameKey("stream"),), gradient, state).grams
    sizes = {role: float(value[0].trace().abs()) / (norm(gradient) * norm(state)) for role, value in pairing.items()}
    assert sizes["vector"] <= PAIRING < 1e-4 < sizes["covector"]


def test_what_is_impossible_is_named():
    for settings, message in (
        ({"step": 1.0}, "`step` must be between 0 and 1, got 1.0"),
        ({"translations": "gone"}, '`translations` must be "zero" or "least", got \'gone\''),
        ({"max_steps": 3}, "`max_steps` must be enough .* got 3, after which it is .* Raise it, or `tolerance`"),
    ):
        with pytest.raises(ValueError, match=message):
            minimum_norm(toy_model(), **settings)
    given = {"batches": [toy_text()], "learning_rate": 0.01, "weight_decay": 0.1, "steps": 50, "every": 50}
    for settings, message in (
        ({"batches": []}, "`batches` must have at least one batch, got none"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive and finite, got 0.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must not be negative, and finite, got -1.0"),
        ({"steps": 0}, "`steps` must be positive and finite, got 0"),
        ({"every": 0}, "`every` must be positive and finite, got 0"),
        ({"learning_rate": 1e4}, "`learning_rate` must be small enough to descend, got 10000.0: after .* steps"),
    ):
        with pytest.raises(ValueError, match=message):
            follow_decay(toy_model(), **given | settings)


@pytest.mark.full
def test_the_picture(monkeypatch):
    monkeypatch.setattr(pictures, "minimum_norm", lambda member, **_: minimum_norm(member, tolerance=1e-6))
    figure = pictures.plot_gauge_fixing(steps=5)
    panels = figure.get_axes()
    assert len(panels) == 3 and all(
        panel.get_title() and panel.get_xlabel() and panel.get_ylabel() for panel in panels
    )
    prediction = [line for line in panels[1].get_lines() if line.get_label() == "exp(-2λt)"]
    assert len(prediction) == 1 and len(prediction[0].get_ydata()) == 6
    ends = [line.get_ydata()[-1] for line in panels[0].get_lines() if len(line.get_xdata()) > 2]
    assert len(ends) == 4 and max(ends) - min(ends) <= PAIRING * max(ends)
    assert len(encoded(figure)) > 20_000
