"""The equivariant optimizer: training from a rotated start is the rotated training."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from rigpt_hf.optim import UPDATE_RULES, EquivariantOptimizer, Update, equivariant_param_groups, update_of
from rigpt_hf.optimizer import polar
from rigpt_hf.optimizer.polar import COEFFICIENTS, exact_polar, newton_schulz, newton_schulz_in
from rigpt_hf.symmetry import GaugeTransformation, haar, table_of
from tests.models import SYMMETRIES, over, tiny_config, tiny_model, tokens
from tests.symmetry.options import BROAD, FEW, SEARCHED, SHALLOW, generator
from tests.tolerances import SYMMETRY, TRAINING


# At three times this rate long training of `gated-relu2` is chaotic: whatever differs, rounding included, doubles
# every ten steps after the hundredth.
STEPS, SHORT, LONG, LEARNING_RATE = 40, 20, 200, 1e-3
BATCHES = [tokens(4, 17, seed=seed) for seed in range(10)]


def train(model, optimizer, steps: int) -> float:
    model.train()
    for step in range(steps):
        ids = BATCHES[step % len(BATCHES)]
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def equivariant(model, **options) -> EquivariantOptimizer:
    return EquivariantOptimizer(equivariant_param_groups(model, lr=LEARNING_RATE), **options)


def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


@torch.no_grad()
def apart(a, b, start) -> float:
    """The distance between two models, relative to the way that one has gone from its start."""
    way, gap = (
        sum(float((p - q).double().square().sum()) for p, q in zip(x.parameters(), b.parameters(), strict=True))
        for x in (start, a)
    )
    return (gap / way) ** 0.5


def trained_both_ways(option: str, make, steps: int) -> float:
    """The distance between training from a turned start and the turned training."""
    model = tiny_model(**SHALLOW[option])
    g = GaugeTransformation.random(model.config, generator(3), "all", compact=True)
    start = g(model)
    turned = copy.deepcopy(start)
    last = BATCHES[(steps - 1) % len(BATCHES)]
    with torch.no_grad():
        before = float(model(last, labels=last, use_cache=False).loss)
    first, second = train(model, make(model), steps), train(turned, make(turned), steps)
    assert first < before - 0.05, "nothing was learned"
    if make is not adamw:
        assert abs(first - second) <= TRAINING
    return apart(g(model), turned, start)


@over(FEW, BROAD)
@pytest.mark.by_default(2)
def test_training_turns_along(option):
    assert trained_both_ways(option, equivariant, STEPS if option in SEARCHED else SHORT) <= TRAINING


@pytest.mark.full
@over(SYMMETRIES, ())
def test_long_training_turns_along(option):
    assert trained_both_ways(option, equivariant, LONG) <= TRAINING


@over(["gated"], ["rotary", "learned-projected"])
def test_training_with_exact_polar_factors_turns_along_and_with_adamw_does_not(option):
    assert trained_both_ways(option, lambda model: equivariant(model, polar="svd"), SHORT) <= TRAINING
    assert trained_both_ways(option, adamw, SHORT) > 1e-2


def test_every_parameter_is_in_one_group_and_every_update_rule_occurs():
    seen = set()
    for options in SYMMETRIES.values():
        model = tiny_model(**options)
        groups = equivariant_param_groups(model)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
        seen |= {group["update_rule"] for group in groups}
        for group in groups:
            assert (group["weight_decay"] > 0) == (group["update_rule"] in ("polar", "rows"))
    assert seen == set(UPDATE_RULES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", Update("rows")),
        ("model.project_in.weight", Update("polar")),
        ("model.layers.0.self_attn.q_proj.weight", Update("polar", 4)),
        ("model.layers.0.self_attn.k_proj.weight", Update("polar", 2)),
        ("model.layers.0.self_attn.o_proj.weight", Update("polar", 4, 1)),
        ("model.layers.0.self_attn.q_proj.bias", Update("vectors", 4)),
        ("model.layers.0.self_attn.k_proj.bias", Update("vectors", 2)),
        ("model.layers.0.self_attn.o_proj.bias", Update("vectors")),
        ("model.layers.0.mlp.up_proj.weight", Update("polar")),
        ("model.layers.0.mlp.down_proj.weight", Update("polar")),
        ("model.layers.0.mlp.up_proj.bias", Update("coordinatewise")),
        ("model.layers.0.mlp.down_proj.bias", Update("vectors")),
        ("model.layers.0.self_attn.distance_weight", Update("coordinatewise")),
        ("model.layers.0.self_attn.rotary_frequencies", Update("coordinatewise")),
    ],
)
def test_updates_follow_from_the_table(name, expected):
    config = tiny_config(embedding_size=24, output_bias=True, attention_score="squared_distance")
    assert update_of(table_of(config), name) == expected


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)], ids=str)
def test_matrices_move_as_muon_moves_them(shape):
    weight = torch.randn(shape, generator=generator(1))
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    groups = [{"params": [ours], "update_rule": "polar"}]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    optimizers = (
        EquivariantOptimizer(groups, **settings),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
    )
    for step in range(5):
        gradient = torch.randn(shape, generator=generator(step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - weight).norm()
    # Muon iterates in bfloat16, so the two agree to its rounding.
    assert (ours - theirs).norm() <= 0.02 * moved
    assert moved > 0.01


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)], ids=str)
def test_polar_factors(shape):
    matrices = torch.randn(3, *shape, generator=generator(2), dtype=torch.float64)
    exact = exact_polar(matrices)
    short = min(shape)
    gram = exact @ exact.mT if shape[0] <= shape[1] else exact.mT @ exact
    assert (gram - torch.eye(short, dtype=torch.float64)).abs().max() <= SYMMETRY[torch.float64]
    express = partial(newton_schulz, method="polar_express")
    for method, low, high in ((newton_schulz, 0.5, 1.4), (express, 0.85, 1.15)):
        singular = torch.linalg.svdvals(method(matrices))
        assert low < singular.min() and singular.max() < high
    left, right = haar(shape[0], generator(3)), haar(shape[1], generator(4))
    for method in (exact_polar, newton_schulz, express):
        turned = method(left @ matrices @ right)
        assert (turned - left @ method(matrices) @ right).abs().max() <= SYMMETRY[torch.float64]
    deficient = matrices.clone()
    deficient[:, 1:] = deficient[:, :1]
    assert torch.linalg.matrix_rank(exact_polar(deficient)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", COEFFICIENTS)
def test_polar_factors_computed_in_half_precision(method, monkeypatch):
    """As on accelerators: long matrices, with singular values that fall, or nearly all zero, stay within bounds."""
    falling = exact_polar(torch.randn(192, 768, generator=generator(2), dtype=torch.float64))
    falling = falling / torch.arange(1, 193)[:, None]
    low_rank = torch.randn(64, 8, generator=generator(3)) @ torch.randn(8, 768, generator=generator(4))
    noise = torch.randn(64, 768, generator=generator(5))
    several = [falling, low_rank + 0.03 * noise, noise, noise @ noise.mT]

    def singular_values() -> list[tuple[float, float]]:
        found = [newton_schulz_in(each.bfloat16(), 5, torch.bfloat16, method) for each in several]
        exact = [newton_schulz_in(each.double(), 5, torch.float64, method) for each in several]
        both = (
            tuple(float(torch.linalg.svdvals(x.double()).max()) for x in pair)
            for pair in zip(found, exact, strict=True)
        )
        return list(both)

    for found, exact in singular_values():
        assert found == pytest.approx(exact, rel=0.05)
    if method == "polar_express":
        monkeypatch.setattr(polar, "LIFTED", 1.0)
        assert max(found for found, _ in singular_values()) > 1.3, "nothing was lifted"


def test_coefficients_are_the_best_for_what_is_left_of_the_interval():
    """By Chebyshev: an odd polynomial of degree 5 is the best one where its error takes turns at four places."""
    low, high = 1e-3, 1.0
    for a, b, c in COEFFICIENTS["polar_express"][:-1]:
        x = torch.linspace(low, high, 2_000_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        inner = error[1:-1]
        turns = inner[((inner > error[:-2]) & (inner > error[2:])) | ((inner < error[:-2]) & (inner < error[2:]))]
        extremes = torch.stack([error[0], *turns, error[-1]])
        assert torch.allclose(extremes * torch.tensor([-1, 1, -1, 1]), extremes.abs().max(), rtol=1e-4)
        low, high = 1 - float(extremes.abs().max()), 1 + float(extremes.abs().max())
    assert low > 0.999


@pytest.mark.parametrize("size", [128, 256])
def test_polar_factors_of_half_precision(size):
    """The rounding of the argument's type, times the size, is 1 here, and would leave no direction."""
    matrix = torch.randn(size, size, generator=generator(5)).to(torch.bfloat16)
    assert size * torch.finfo(torch.bfloat16).eps >= 1
    factor = exact_polar(matrix)
    assert factor.dtype == torch.bfloat16
    singular = torch.linalg.svdvals(factor.double())
    assert (singular - 1).abs().max() <= size**0.5 * torch.finfo(torch.bfloat16).eps
    deficient = matrix.clone()
    deficient[1:] = deficient[:1]
    assert torch.linalg.matrix_rank(exact_polar(deficient).double(), rtol=0.1) == 1
    weight = nn.Parameter(torch.zeros(size, size, dtype=torch.bfloat16))
    weight.grad = matrix
    EquivariantOptimizer([{"params": [weight], "update_rule": "polar"}], lr=0.1, polar="svd").step()
    # An orthogonal matrix of this size, times 0.2 of its root.
    assert float(weight.detach().double().square().mean().sqrt()) == pytest.approx(0.02, rel=0.01)


def test_state_dicts_resume_exactly():
    straight, broken = tiny_model(), tiny_model()
    train(straight, equivariant(straight), 10)
    # `train` starts over with the batches, so both halves of five see the first five.
    first = equivariant(broken)
    train(broken, first, 10)
    resumed = copy.deepcopy(broken)
    second = equivariant(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(broken, first, 5)
    train(resumed, second, 5)
    for a, b in zip(broken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = copy.deepcopy(straight)
    train(fresh, equivariant(fresh), 5)
    assert apart(fresh, broken, tiny_model()) > 1e-3, "the state does not matter, so the test shows nothing"


@torch.no_grad()
def test_a_state_or_a_table_of_another_shape_is_refused():
    model = tiny_model()
    optimizer = equivariant(model)
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="`state_dict` must be that of an `EquivariantOptimizer`.*AdamW's groups"):
        optimizer.load_state_dict(torch.optim.AdamW(groups).state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.resize_token_embeddings(model.config.vocab_size + 5)
    with pytest.raises(ValueError, match="a table was resized since. Make a new optimizer after `resize_token_emb"):
        optimizer.step()


def test_schedulers_and_closures():
    model = tiny_model()
    optimizer = equivariant(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        optimizer.zero_grad()
        loss = model(BATCHES[0], labels=BATCHES[0]).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    before = copy.deepcopy(model)
    second = optimizer.step(closure)
    assert second < first
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_multipliers_and_frozen_parameters():
    model = tiny_model(embedding_size=24)
    model.model.embed_tokens.requires_grad_(False)
    groups = equivariant_param_groups(model, lr=1.0, lr_multipliers={"vectors": 0.3})
    assert {group["lr"] for group in groups if group["update_rule"] == "vectors"} == {0.3}
    assert {group["lr"] for group in groups if group["update_rule"] != "vectors"} == {1.0}
    assert not any("embed_tokens" in name for group in groups for name in group["names"])
    model = tiny_model(attention_score="squared_distance", value_embedding_period=1)
    wanted = {"value_embedding": 10.0, "distance_weight": 0.5, "coordinatewise": 0.1}
    groups = equivariant_param_groups(model, lr=1.0, lr_multipliers=wanted)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["model.layers.1.self_attn.value_embedding.weight"] == 10.0
    assert rates["model.layers.1.self_attn.distance_weight"] == 0.5
    assert rates["model.layers.1.mlp.up_proj.bias"] == 0.1
    assert rates["model.embed_tokens.weight"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be at least 0, got -1.0"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers"),
        ({"eps": 0.0}, "`eps` must be positive"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0"),
        ({"polar": "qr"}, "`polar` must be one of newton_schulz, polar_express, svd"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"sharing": "some"}, "`sharing` must be one of auto, all, none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EquivariantOptimizer(equivariant_param_groups(tiny_model()), **options)


def test_plain_parameters_are_refused():
    with pytest.raises(ValueError, match="Pass `equivariant_param_groups\\(model\\)`"):
        EquivariantOptimizer(tiny_model().parameters())
    with pytest.raises(ValueError, match="`lr_multipliers` must be keyed by polar, rows"):
        equivariant_param_groups(tiny_model(), lr_multipliers={"biases": 1.0})


def test_an_unknown_parameter_is_named():
    model = tiny_model()
    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter 'model.extra.weight'"):
        equivariant_param_groups(model)
