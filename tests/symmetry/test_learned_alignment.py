"""Alignments that are learned on text: what they leave alone, what they descend, and what that is good for."""

import copy
import math

import pytest
import torch
from torch import nn

from rigpt_hf.frames import table_of
from rigpt_hf.symmetry import (
    GaugeTransformation,
    Learning,
    align,
    find_alignment,
    find_learned_alignment,
    learn_alignment,
    loss_path,
    merge,
)
from rigpt_hf.symmetry.contraction import weights_of
from rigpt_hf.symmetry.learned_alignment import EXCHANGED, Learner
from rigpt_hf.symmetry.merging import average, with_weights
from tests.models import SYMMETRIES, over, tiny_config, tiny_model, tokens
from tests.symmetry.options import BROAD, FEW, SEARCHED, SHALLOW, difference, disguise, generator
from tests.symmetry.test_merging import TRAINING_WINDOWS, functions_differ, markov_windows, school  # noqa: F401
from tests.tolerances import SYMMETRY


EXACT = SYMMETRY[torch.float64]


def pair(option: str) -> tuple[nn.Module, nn.Module]:
    return tiny_model(**SHALLOW[option]), tiny_model(seed=9, **SHALLOW[option])


def few(steps: int = 3, rate: float = 0.1) -> Learning:
    return Learning([tokens(2, 9), tokens(2, 9).flip(1)], steps, rate)


def learner_of(a: nn.Module, b: nn.Module) -> Learner:
    return Learner(b, find_alignment(a, b), few())


@over(FEW, SYMMETRIES)
@pytest.mark.by_default(2)
def test_every_frame_is_learned_and_the_ends_stay_the_same_functions(option):
    a, b = pair(option)
    before = copy.deepcopy(a), copy.deepcopy(b)
    learned = find_learned_alignment(a, b, few())
    g = learned.transformation
    assert functions_differ(g(a), a) <= EXACT
    ends = [learned.to_balanced.inverse().state_dict(side) for side in (learned.reference, learned.aligned)]
    for end, model in zip(ends, (b, a), strict=True):
        assert functions_differ(with_weights(b, end), model) <= EXACT
    assert functions_differ(a, b) > 0.1, "both ends are one"
    assert all(difference(*two) == 0 for two in zip(before, (a, b), strict=True)), "a model was changed"

    table, start = table_of(b.config), align(a, b)
    step = learned.to_balanced @ g @ start.inverse() @ learned.to_balanced.inverse()
    moved = 0
    for key, frame in table.frames.items():
        if frame.group.dimension and (not frame.shift.constant if frame.shift is not None else table.walk(key)):
            assert str(key) in step.elements, f"{key} has not been learned"
            away = step.elements[str(key)] - frame.group.identity(frame.copies)
            assert float(away.abs().max()) > 1e-3, f"{key} rests"
            moved += 1
    assert moved >= 3


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_what_is_descended_is_the_derivative_of_the_loss_half_way(option):
    """By finite differences along random directions of every Lie algebra."""
    learner = learner_of(*pair(option))
    weights, batch = dict(learner.weights), few().batches[0]
    pairings = {key: pairing for key, pairing, _ in learner.pairings(learner.gradient(batch))}
    checked, small = 0, 1e-5
    for key, pairing in pairings.items():
        frame = learner.table.frames[key]
        direction = torch.randn(pairing.shape, generator=generator(), dtype=torch.float64)
        direction = frame.group.project(direction)
        losses = []
        for sign in (1, -1):
            element = frame.group.exp(sign * small * direction)
            keys = learner.table.streams if key in learner.table.streams else (key,)
            g = GaugeTransformation(learner.config, dict.fromkeys(keys, element))
            learner.weights = g.state_dict(weights)
            learner.gradient(batch)
            losses.append(learner.losses[-1])
        measured, expected = (losses[0] - losses[1]) / (2 * small), float((pairing * direction).sum()) / 2
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-7), key
        checked += abs(expected) > 1e-6
    assert checked >= 3


@over(SEARCHED[1:3], SYMMETRIES)
@pytest.mark.full
def test_between_a_model_and_itself_there_is_nothing_to_learn(option):
    """Noether; and a gradient by rounding alone does not lead away."""
    a, b = pair(option)
    for other, least, most in ((disguise(b), 0, EXACT), (a, 1e-3, math.inf)):
        learner = learner_of(other, b)
        found = [
            float(pairing.norm()) / size
            for _, pairing, size in learner.pairings(learner.gradient(tokens(2, 9)))
            if size
        ]
        assert found and least <= max(found) <= most
    learned = find_learned_alignment(disguise(b), b, few())
    assert difference(with_weights(b, learned.to_balanced.inverse().state_dict(learned.aligned)), b) <= 1e3 * EXACT


@over(BROAD, SYMMETRIES)
@pytest.mark.by_default(8)
def test_to_transform_both_ends_is_to_transform_what_is_between(option):
    """So that learning one end is learning both."""
    a, b = (weights_of(model) for model in pair(option))
    g = GaugeTransformation.random(table_config(option), generator(3), "all")
    between, turned = (
        average([a, b], [0.3, 0.7], "linear"),
        average([g.state_dict(a), g.state_dict(b)], [0.3, 0.7], "linear"),
    )
    expected, one_end = g.state_dict(between), average([a, g.state_dict(b)], [0.3, 0.7], "linear")
    scale = max(float(value.abs().max()) for value in expected.values())
    away = [
        max(float((side[name] - value).abs().max()) for name, value in expected.items()) for side in (turned, one_end)
    ]
    assert away[0] <= EXACT * scale and away[1] > 0.01 * scale


def table_config(option: str):
    return tiny_config(**SHALLOW[option])


@pytest.mark.parametrize("option", ["learned-untied-projected", "gated-relu2"])
@pytest.mark.full
def test_the_frames_that_models_come_in_do_not_matter(option):
    a, b = pair(option)

    def merged(first: nn.Module, second: nn.Module) -> nn.Module:
        return merge([first, second], (0.6, 0.4), alignments=[find_learned_alignment(second, first, few(2, 0.03))])

    plain, other = merged(b, a), merged(disguise(b, 3), disguise(a, 2))
    assert functions_differ(other, plain) <= 1e3 * EXACT
    assert functions_differ(merge([b, a], (0.6, 0.4)), plain) > 1e-3, "learning did nothing"


def test_neurons_are_exchanged_where_their_latent_weights_are():
    """Latent weights that are those of another order bring the neurons into that order; others leave them."""
    learner = learner_of(*pair("gated-relu2"))
    still = {name: torch.zeros_like(value) for name, value in learner.weights.items()}
    orders = {
        key: frame.group.random(frame.copies, generator(2))
        for key, frame in learner.table.frames.items()
        if key.kind in EXCHANGED
    }
    assert orders
    for element in orders.values():
        element[:, 1:] = 1.0
    expected = GaugeTransformation(learner.config, orders).state_dict(learner.weights)
    learner.latent = {name: expected[name] for name in learner.latent}
    before = dict(learner.weights)
    learner.exchange(still, 0.0)
    for name, value in expected.items():
        assert torch.equal(learner.weights[name], value), name
    assert any(not torch.equal(before[name], value) for name, value in expected.items())


@pytest.mark.full
def test_learning_lowers_the_barrier_between_trained_models(school):  # noqa: F811
    models, loss = school
    windows = markov_windows()[:TRAINING_WINDOWS]
    learning = Learning(windows.split(50), steps=40)
    at_random = Learning(windows.roll(1, 0)[:, torch.randperm(16, generator=generator())].split(50), steps=40)
    barriers = []
    for i, j in ((0, 1), (1, 2), (2, 0)):
        learned = find_learned_alignment(models[i], models[j], learning)
        path = loss_path(models[i], models[j], loss, points=5, learned=learned)
        assert path.learned[::4] == pytest.approx(path.after[::4], rel=SYMMETRY[torch.float32])
        assert len(learned.losses) == 40
        barriers.append((path.barrier_after, path.barrier_learned))
        print(f"{i} to {j}: barrier {path.barrier_after:.4f} -> {path.barrier_learned:.4f} nats per token")
        assert path.reversed().learned == path.learned[::-1]
        assert path.to_dict()["barrier_learned"] == path.barrier_learned
    after, learned = (sum(values) / 3 for values in zip(*barriers, strict=True))
    assert learned < 0.8 * after
    nonsense = find_learned_alignment(models[0], models[1], at_random)
    control = loss_path(models[0], models[1], loss, points=5, learned=nonsense)
    assert control.barrier_learned > barriers[0][1], "any text does"


def test_impossible_settings_are_refused():
    batch = tokens(2, 5)
    for arguments, message in (
        (([],), r"`batches` must hold at least one batch of token ids, got none\. Give a longer text\."),
        (
            ([batch, batch[0]],),
            r"`batches` must be token ids \[batch, seq\] with at least two to a row, got the shape \(5,\)",
        ),
        (([batch[:, :1]],), r"`batches` must be token ids .* got the shape \(2, 1\)\. Cut the text into windows\."),
        (([batch], 0), r"`steps` must be positive, got 0\. Take another\."),
        (([batch], 3, math.nan), r"`learning_rate` must be positive, got nan\. Take another\."),
    ):
        with pytest.raises(ValueError, match=message):
            Learning(*arguments)
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="`model` and `reference` must have the same `num_hidden_layers`"):
        learn_alignment(tiny_model(num_hidden_layers=2), model, [batch], steps=1)
    for settings, given in (({"aligned": False}, "1 with `aligned=False`"), ({}, "2 with `aligned=True`")):
        known = [find_alignment(model, model)] * (1 if settings else 2)
        with pytest.raises(
            ValueError, match=f"`alignments` must be one of each model but the first, 1, .* got {given}"
        ):
            merge([model, model], alignments=known, **settings)
    broken = copy.deepcopy(model)
    broken.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"`reference` must predict tokens, whose loss is descended, got RiGPT"):
        learn_alignment(model, broken, [batch])
    damaged = Learner(model, find_alignment(tiny_model(seed=9, num_hidden_layers=1), model), Learning([batch]))
    damaged.weights = {name: value * math.nan for name, value in damaged.weights.items()}
    with pytest.raises(
        ValueError, match=r"`learning_rate` must keep the loss finite, got nan after 1 steps with 0\.03"
    ):
        damaged.step(0)
