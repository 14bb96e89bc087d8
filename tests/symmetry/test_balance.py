"""Balancing: charges vanish, the norm is least, the function stays, and only a compact freedom is left."""

import pytest
import torch

from rigpt_hf.groups import MatrixGroup, NeuronGroup, general_linear, orthogonal
from rigpt_hf.groups.least_norm import common_stretch, contragredient
from rigpt_hf.symmetry import FrameKey, GaugeTransformation, charges, gauge_error, table_of
from rigpt_hf.symmetry.balance import balance
from rigpt_hf.symmetry.contraction import weights_of
from tests.models import SYMMETRIES, over, tokens
from tests.symmetry.options import BROAD, generator
from tests.symmetry.test_groups import over as over_groups
from tests.tolerances import BALANCE, SYMMETRY


# With D > d the projections leave directions of token vectors empty: what one side alone fills has no least length.
LONELY = {"untied-projected": {"lexical", "output"}}
SEEDS = range(3)


def square(weights) -> float:
    return sum(float(tensor.square().sum()) for tensor in weights.values())


def quadratic_charges(model, name: str) -> dict[str, torch.Tensor]:
    """Those of stretches; translations have charges that are linear in the weights."""
    kinds, lonely = table_of(model.config).kinds, LONELY.get(name, set())
    quadratic = {kind for kind, frame in kinds.items() if frame.shift is None} - lonely
    return {key: charge for key, charge in charges(model).items() if FrameKey.parse(key).kind in quadratic}


@over(BROAD, SYMMETRIES)
@pytest.mark.by_default(10)
def test_balanced_models_have_no_charge_and_no_translation(turned, option):
    model = turned(option).model
    config, raw = model.config, weights_of(model)
    transformation, weights = balance(config, raw)
    balanced = transformation(model)
    before, after = quadratic_charges(model, option), quadratic_charges(balanced, option)
    assert {FrameKey.parse(key).kind for key in after} >= {"head_vo"}
    assert all(float(charge.norm()) <= BALANCE * square(weights) for charge in after.values())
    assert all(float(charge.norm()) > 1e-4 * square(weights) for charge in before.values()), "there was none before"
    # The second result is the first applied, and the function stays.
    for key, tensor in weights_of(balanced).items():
        assert (tensor - weights[key]).abs().max() <= SYMMETRY[torch.float64] * tensor.abs().max(), key
    assert gauge_error(model, transformation, tokens(2, 9)) <= SYMMETRY[torch.float64]
    changed = [name for name, tensor in raw.items() if not torch.allclose(tensor, weights[name])]
    assert len(changed) >= 3 * config.num_hidden_layers, "balancing did nothing to speak of"

    again, _ = balance(config, weights)
    shifts = [str(key) for key in table_of(config).shifts]
    assert len(shifts) >= config.num_hidden_layers or option in ("no-biases", "sinks-learned")
    for key in shifts:
        moved = transformation.elements[key].abs().max()
        assert moved > 1e-3
        assert again.elements[key].abs().max() <= BALANCE * moved, key


@over(BROAD, SYMMETRIES)
@pytest.mark.by_default(10)
def test_the_balanced_norm_is_the_least_and_only_a_compact_freedom_is_left(turned, option):
    """Rotations, reflections and permutations leave the norm of every parameter alone, stretches do not."""
    model, disguised, _ = turned(option)
    config, lonely, raw = model.config, LONELY.get(option, set()), weights_of(disguised)
    balanced = balance(config, weights_of(model))[1]
    least = square(balanced)
    if not lonely:
        assert least < square(balance(config, weights_of(model), passes=0)[1])
    kinds = table_of(config).kinds
    stretching = {kind for kind, frame in kinds.items() if frame.group.stretches} - lonely
    compact = {"stream", "heads"} | {"head_qk"} - stretching
    for seed in SEEDS:
        other = GaugeTransformation.random(config, generator(seed), stretching)
        assert square(other.state_dict(balanced)) > 1.001 * least
        rotated = GaugeTransformation.random(config, generator(seed), compact)
        assert abs(square(rotated.state_dict(balanced)) - least) <= BALANCE * least
    second, stretched = balance(config, raw)[1], 0
    for parameter, tensor in balanced.items():
        norm = float(tensor.norm())
        assert abs(float(second[parameter].norm()) - norm) <= SYMMETRY[torch.float64] * norm, parameter
        stretched += abs(float(raw[parameter].norm()) - norm) > 0.01 * norm
    assert stretched >= 2 * config.num_hidden_layers, "the disguise stretched nothing to speak of"


def factor(n: int, rank: int, seed: int) -> torch.Tensor:
    """Of this rank; more columns where it is full, as a square random matrix is nearly singular."""
    rank = rank if rank < n else max(rank, n + 4)
    return torch.randn(n, rank, generator=generator(seed), dtype=torch.float64)


def gram(n: int, rank: int, seed: int) -> torch.Tensor:
    vectors = factor(n, rank, seed)
    return vectors @ vectors.T


def contragredient_grams(vectors: torch.Tensor, covectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrices of what has been transformed, as transforming Gram matrices squares condition numbers."""
    m = contragredient(vectors @ vectors.T, covectors @ covectors.T)
    turned = m @ vectors, torch.linalg.solve(m.T, covectors)
    return turned[0] @ turned[0].T, turned[1] @ turned[1].T


@pytest.mark.parametrize("n", [1, 2, 24])
def test_contragredient_matrices(n):
    vectors, covectors = factor(n, n, 0), factor(n, 2 * n, 1)
    first, second = contragredient_grams(vectors, covectors)
    diagonal = first.diagonal()
    assert (first - second).abs().max() <= BALANCE * diagonal.max()
    assert (first - diagonal.diag()).abs().max() <= BALANCE * diagonal.max()
    assert (diagonal.diff() <= 0).all() and diagonal.min() > 0
    assert (torch.linalg.svdvals(vectors.T @ covectors)[:n] - diagonal).abs().max() <= BALANCE * diagonal.max()
    assert (vectors @ vectors.T - covectors @ covectors.T).abs().max() > 0.1, "they were balanced before"


@pytest.mark.parametrize(
    ("ranks", "shared"),
    [((8, 5), 5), ((5, 8), 5), ((8, 0), 0), ((0, 8), 0), ((0, 0), 0), ((5, 5), 5), ((3, 6), 3), ((6, 3), 3)],
    ids=str,
)
def test_contragredient_matrices_of_low_rank(ranks, shared):
    """In general position: the product of the factors has the smaller rank."""
    n = 8
    first, second = contragredient_grams(factor(n, ranks[0], 2), factor(n, ranks[1], 3))
    scale = max(float(first.abs().max()), float(second.abs().max()))
    checked = {"both": 0, "vectors": 0, "covectors": 0, "none": 0}
    for value in (first, second):
        assert (value - value.diagonal().diag()).abs().max() <= BALANCE * scale
    for a, b in zip(first.diagonal(), second.diagonal(), strict=True):
        filled = bool(a > BALANCE * scale), bool(b > BALANCE * scale)
        kind = {(True, True): "both", (True, False): "vectors", (False, True): "covectors"}.get(filled, "none")
        checked[kind] += 1
        if kind == "both":
            assert abs(a - b) <= BALANCE * scale
    assert checked == {
        "both": shared,
        "vectors": ranks[0] - shared,
        "covectors": ranks[1] - shared,
        "none": n - ranks[0] - ranks[1] + shared,
    }


@pytest.mark.parametrize("ranks", [(8, 8), (8, 5), (5, 8), (5, 5), (3, 6), (8, 0), (0, 4)], ids=str)
def test_what_contragredient_matrices_find_does_not_depend_on_the_frame(ranks):
    vectors, covectors = factor(8, ranks[0], 4), factor(8, ranks[1], 5)
    h = general_linear(8).random(generator=generator(6))[0]
    other = h @ vectors, torch.linalg.solve(h.T, covectors)
    spectra = [
        [torch.linalg.eigvalsh(found) for found in contragredient_grams(*pair)]
        for pair in ((vectors, covectors), other)
    ]
    for one, two in zip(*spectra, strict=True):
        assert (one - two).abs().max() <= BALANCE * max(float(each.max()) for pair in spectra for each in pair)
    raw = [torch.linalg.svdvals(each) for each in ((vectors, other[0]) if ranks[0] else (covectors, other[1]))]
    assert (raw[0] - raw[1]).abs().max() > 0.01 * raw[0].max(), "the frames hardly differ"


def test_balancing_turns_nothing():
    """Of all elements that balance the symmetric positive one is taken, so what is balanced stays."""
    group = MatrixGroup(8, "free", planes=((0, 2), (1, 3)))
    vectors, covectors = gram(8, 12, 7), gram(8, 12, 8)
    element = group.balance({"vector": vectors[None], "covector": covectors[None]})[0]
    assert (element - element.T).abs().max() <= BALANCE and torch.linalg.eigvalsh(element).min() > 0
    inverse = torch.linalg.inv(element)
    balanced = {"vector": (element @ vectors @ element.T)[None], "covector": (inverse.T @ covectors @ inverse)[None]}
    charge = group.project(balanced["vector"] - balanced["covector"])
    assert charge.abs().max() <= BALANCE * vectors.abs().max()
    again = group.balance(balanced)[0]
    eye = torch.eye(8, dtype=torch.float64)
    assert (again - eye).abs().max() <= SYMMETRY[torch.float64] < 0.1 < (element - eye).abs().max()


def test_where_lengths_matter_nothing_is_stretched():
    group = orthogonal(4)
    grams = {"vector": gram(4, 6, 0)[None], "covector": gram(4, 6, 1)[None]}
    assert torch.equal(group.balance(grams), group.identity())
    assert not group.stretches and general_linear(4).stretches
    assert not NeuronGroup(4).stretches and NeuronGroup(4, 1).stretches and NeuronGroup(4, None, True).stretches


@pytest.mark.parametrize("metric", [0.0, 0.3, 40.0])
def test_the_common_stretch_solves_its_equation(metric):
    checked = 0
    for exponent in range(-6, 7, 3):
        a, b, c = torch.tensor([2.0, 3.0 * 10.0**exponent, metric], dtype=torch.float64)
        s = common_stretch(a, b, c)
        assert abs(s * a - b / s + 2 * s**2 * c) <= BALANCE * (b / s)
        if metric == 0:
            assert abs(s - (b / a).sqrt()) <= BALANCE * s
        checked += abs(float(s) - 1) > 0.1
    assert checked >= 3


def test_the_common_stretch_of_nothing():
    """There is no least norm, as it tends to 0; but the point must not depend on where it came from."""
    zero, one, four = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    assert abs(common_stretch(four, zero, zero) * 4 - common_stretch(one, zero, zero)) <= BALANCE
    assert abs(common_stretch(zero, four, zero) - 4 * common_stretch(zero, one, zero)) <= BALANCE * common_stretch(
        zero, four, zero
    )
    assert common_stretch(zero, zero, zero) == 1


SCALINGS = {
    "relu": NeuronGroup(12, 1),
    "relu2": NeuronGroup(12, 2),
    "gated": NeuronGroup(12, None, True),
    "gated-relu": NeuronGroup(12, 1, True),
    "gated-relu2": NeuronGroup(12, 2, True),
}


def norms_of(group: NeuronGroup, seed: int = 0) -> dict[str, torch.Tensor]:
    roles = ("active", "linear", "down") if group.gated else ("active", "down")
    draw = generator(seed)
    return {role: (4 * torch.randn(1, group.n, generator=draw, dtype=torch.float64)).exp() for role in roles}


def scaled(group: NeuronGroup, element: torch.Tensor, norms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {role: group.act(element, role, norm[0].sqrt()[:, None]).square().T for role, norm in norms.items()}


@over_groups(SCALINGS)
def test_scales_of_neurons_have_least_norm(group):
    norms = norms_of(group)
    balanced = scaled(group, group.balance(norms), norms)
    total = sum(balanced.values())
    assert (group.generator(balanced) / total).abs().max() <= BALANCE
    assert (group.generator(norms) / sum(norms.values())).abs().max() > 0.1, "they were balanced before"
    for seed in SEEDS:
        element = group.random(generator=generator(seed), special=True)
        assert (sum(scaled(group, element, balanced).values()) >= total).all()


@over_groups(SCALINGS)
def test_neurons_with_an_empty_factor_are_scaled_to_one_point_of_their_orbit(group):
    """There is no least norm, as it tends to 0; but the point must not depend on where it came from."""
    for empty in ("active", "down", "linear", "active down", "active linear"):
        if not group.gated and "linear" in empty:
            continue
        norms = norms_of(group)
        for role in empty.split():
            norms[role] = norms[role] * (torch.arange(group.n) % 2)
        draws = [group.random(generator=generator(seed), special=True) for seed in SEEDS]
        members = [norms, *(scaled(group, element, norms) for element in draws)]
        balanced = [scaled(group, group.balance(member), member) for member in members]
        for other in balanced[1:]:
            for role, norm in balanced[0].items():
                assert ((other[role] - norm).abs() <= BALANCE * norm).all(), (empty, role)
        assert all((member["down"] != norms["down"]).any() or "down" in empty for member in members[1:])
        charge = group.generator(balanced[0]) / sum(balanced[0].values())
        assert charge[..., 1::2].abs().max() <= BALANCE, "the neurons that are whole are not balanced"


@pytest.mark.parametrize("stretch", ["free", "none"])
def test_planes_that_only_one_side_fills_are_scaled_to_one_point_of_their_orbit(stretch):
    group = MatrixGroup(6, stretch, planes=((0, 2), (1, 3)))
    vectors, covectors = gram(6, 9, 9), gram(6, 9, 10)
    for gone, gram_of in ((0, vectors), (1, covectors)):
        gram_of[[gone, gone + 2]] = 0
        gram_of[:, [gone, gone + 2]] = 0
    results = []
    for seed in SEEDS:
        h = group.random(generator=generator(seed))[0]
        back = torch.linalg.inv(h)
        a, b = h @ vectors @ h.T, back.T @ covectors @ back
        m = group.balance({"vector": a[None], "covector": b[None]})[0]
        inverse = torch.linalg.inv(m)
        results.append(torch.cat([torch.linalg.eigvalsh(x) for x in (m @ a @ m.T, inverse.T @ b @ inverse)]))
    assert max(float((other - results[0]).abs().max()) for other in results[1:]) <= BALANCE * float(results[0].max())
