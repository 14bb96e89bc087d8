"""The groups are groups: their laws, algebras, paths and roles, checked against definitions written out here."""

import math

import pytest
import torch

from rigpt_hf.groups import (
    SPREAD,
    ExpertPermutations,
    GainScalings,
    HalfTurns,
    HeadPermutations,
    MatrixGroup,
    NeuronGroup,
    Translations,
    general_linear,
    haar,
    orthogonal,
)
from tests.symmetry.options import generator
from tests.tolerances import SYMMETRY


TIGHT = SYMMETRY[torch.float64]
PLANES = ((0, 2), (1, 3))
# What each stretch is combined with: size, planes, whether these move.
SHAPES = {
    "one-plane": (2, ((0, 1),), False),
    "planes": (4, PLANES, False),
    "planes-and-rest": (7, PLANES, False),
    "planes-and-one-more": (5, PLANES, False),
    "movable-planes": (6, ((0, 3), (1, 4), (2, 5)), True),
    "movable-planes-and-rest": (7, PLANES, True),
}
MATRIX_GROUPS: dict[str, MatrixGroup] = {
    "O(1)": orthogonal(1),
    "O(2)": orthogonal(2),
    "O(5)": orthogonal(5),
    "GL(1)": general_linear(1),
    "GL(4)": general_linear(4),
    "common-1": MatrixGroup(1, "common"),
    "common-4": MatrixGroup(4, "common"),
} | {
    f"{stretch}-{name}": MatrixGroup(n, stretch, planes, movable)
    for stretch in ("none", "common", "free")
    for name, (n, planes, movable) in SHAPES.items()
}
HEAD_GROUPS = {
    "heads-4": HeadPermutations(4, 1),
    "heads-3x2": HeadPermutations(3, 2),
    "heads-1x3": HeadPermutations(1, 3),
    "experts-4": ExpertPermutations(4, 1),
}
NEURON_GROUPS = {
    f"neurons-degree-{degree}{'-gated' if gated else ''}": NeuronGroup(6, degree, gated)
    for degree in (None, 1, 2)
    for gated in (False, True)
}
SIGN_GROUPS = {
    f"half-turns-{name}": HalfTurns(n, planes) for name, (n, planes, movable) in SHAPES.items() if not movable
} | {"half-turns-rest": HalfTurns(3)}
GAIN_GROUPS = {
    f"gains-{stretch}-{name}": GainScalings(n, stretch, planes)
    for stretch in ("none", "common", "free")
    for name, (n, planes) in {"planes": (4, PLANES), "planes-and-rest": (7, PLANES), "rest": (3, ())}.items()
} | {"gains-of-each-head": GainScalings(7, "free", PLANES, repeats=2)}
TRANSLATIONS = {
    "translations": Translations(5),
    "translations-of-some": Translations(5, (1, 4)),
}
GROUPS = MATRIX_GROUPS | HEAD_GROUPS | NEURON_GROUPS | SIGN_GROUPS | GAIN_GROUPS | TRANSLATIONS


def over(groups: dict):
    """One test for a law, which looks at all these groups and names the one that breaks it."""
    assert groups

    def of_all(law):
        def test():
            for name, group in groups.items():
                try:
                    law(group)
                except BaseException as error:
                    error.add_note(f"group: {name}")
                    raise

        test.__name__, test.__doc__ = law.__name__, law.__doc__
        return test

    return of_all


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def copies_of(group) -> int:
    """Heads are one per layer; the rest comes in stacks, whose copies must not mix."""
    return 1 if isinstance(group, HeadPermutations) else 3


def draw(group, seed: int = 0, special: bool = False) -> torch.Tensor:
    return group.random(copies_of(group), generator(seed), special)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors, relative to the largest entry but not to less than one."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item()) if b.numel() else 0.0


def small_algebra(group, copies: int, seed: int = 0) -> torch.Tensor:
    """Elements of the Lie algebra short enough to be the logarithm of their exponential."""
    match group:
        case MatrixGroup():
            return 0.2 * group.project(gaussian(copies, group.n, group.n, seed=seed))
        case NeuronGroup():
            return 0.2 * group.allowed[:, None] * gaussian(copies, 2, group.n, seed=seed)
        case GainScalings():
            return 0.2 * gaussian(copies, group.dimension, seed=seed)
        case Translations():
            return group.project(gaussian(copies, group.n, seed=seed))
    return torch.zeros(copies, 0, dtype=torch.float64)


def plane_rotation(group: MatrixGroup, angles: torch.Tensor) -> torch.Tensor:
    """What rotary positions do to a vector when they turn every plane by its angle."""
    matrix = torch.eye(group.n, dtype=torch.float64)
    for (i, j), angle in zip(group.planes, angles.tolist(), strict=True):
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[j, i], matrix[i, j] = math.sin(angle), -math.sin(angle)
    return matrix


def distance_from(group: MatrixGroup, matrix: torch.Tensor) -> float:
    """How far a matrix `[n, n]` is from the group by its definition; large for singular ones."""
    gram = matrix.T @ matrix
    eye = torch.eye(group.n, dtype=torch.float64)
    length = {"none": eye, "common": gram.trace() / group.n * eye, "free": gram}[group.stretch]
    off = difference(gram, length) if torch.linalg.det(matrix).abs() > TIGHT else math.inf
    if group.planes:
        # Angles at which no two planes turn alike, not even mirrored.
        angles = torch.arange(1, len(group.planes) + 1, dtype=torch.float64) / len(group.planes)
        turned = group.act(matrix[None], "planes", angles[:, None])[:, 0] if group.movable else angles
        off = max(off, difference(matrix @ plane_rotation(group, angles), plane_rotation(group, turned) @ matrix))
    return off


@over(GROUPS)
def test_the_laws_of_a_group(group):
    a, b, c = (draw(group, seed) for seed in (1, 2, 3))
    identity = group.identity(copies_of(group))
    assert a.shape == group.shape(copies_of(group)) == identity.shape
    assert difference(group.product(a, identity), a) == difference(group.product(identity, a), a) == 0
    left, right = group.product(group.product(a, b), c), group.product(a, group.product(b, c))
    assert difference(left, right) <= TIGHT
    for product in (group.product(a, group.inverse(a)), group.product(group.inverse(a), a)):
        assert difference(product, identity) <= TIGHT
    assert difference(group.inverse(group.inverse(a)), a) <= TIGHT
    backwards = group.product(group.inverse(b), group.inverse(a))
    assert difference(group.inverse(group.product(a, b)), backwards) <= TIGHT


@over(GROUPS)
def test_random_elements_repeat_with_their_generator_and_differ_otherwise(group):
    assert torch.equal(draw(group, 1), draw(group, 1))
    draws = [draw(group, seed) for seed in range(12)]
    assert any(not torch.equal(draws[0], other) for other in draws)
    copies = group.random(2, generator(1))
    assert copies.shape == group.shape(2)
    assert any(not torch.equal(*group.random(2, generator(seed))) for seed in range(12)), "the copies are alike"


@over(MATRIX_GROUPS)
def test_elements_are_in_the_group_and_commute_with_rotary_positions(group):
    a, b = draw(group, 4), draw(group, 5)
    path = group.path(draw(group, 6, special=True), 0.3)
    elements = [a, b, group.product(a, b), group.inverse(a), path, group.exp(small_algebra(group, 3))]
    for stack in elements:
        for matrix in stack:
            assert distance_from(group, matrix) <= TIGHT
    # Wherever only rotations are in the group, or only what commutes, most matrices are not.
    shear = torch.eye(group.n, dtype=torch.float64)
    shear[0, -1] += 0.1
    turn = haar(group.n, generator(7), special=True)
    outside = [distance_from(group, matrix) > 0.01 for matrix in (shear, turn)]
    assert outside == [
        group.stretch == "none" or (group.n > 1 and (group.stretch == "common" or bool(group.planes))),
        bool(group.planes) and group.n > 2,
    ]


@over(MATRIX_GROUPS)
def test_stretches_stay_in_bounds_and_both_orientations_occur(group):
    stack = group.random(60, generator(8))
    singular_values = torch.linalg.svdvals(stack)
    assert singular_values.max() <= SPREAD * (1 + TIGHT) and singular_values.min() >= (1 - TIGHT) / SPREAD
    ratios = singular_values[:, 0] / singular_values[:, -1]
    assert ((singular_values.log().abs() > 0.1).any() == (group.stretch != "none")).all()
    several = len(group.planes) > 1 or len(group.rest) > 1 or bool(group.planes and group.rest)
    assert (ratios.max() > 1.1) == (group.stretch == "free" and several)
    determinants = torch.linalg.det(stack).sign().unique().tolist()
    assert determinants == ([-1, 1] if group.rest or group.movable else [1])
    assert (torch.linalg.det(group.random(60, generator(8), special=True)) > 0).all()


@over(NEURON_GROUPS)
def test_scalings_of_neurons_stay_in_bounds_on_either_side_of_one(group):
    order, active, linear = group.random(40, generator(8)).unbind(1)
    assert len(order.unique(dim=0)) > 30
    for scales, allowed in ((active, group.degree is not None), (linear.abs(), group.gated)):
        assert scales.max() <= SPREAD and scales.min() >= 1 / SPREAD
        assert [(scales > 1.1).any(), (scales < 0.9).any()] == [allowed, allowed]
    assert (active > 0).all() and (linear < 0).any() == group.gated
    assert (group.random(40, generator(8), special=True)[:, 1:] > 0).all()


def test_planes_turn_by_uniform_angles():
    group = MatrixGroup(4, "free", PLANES)
    stack = group.random(3000, generator(9))
    angles = torch.atan2(stack[:, 2, 0], stack[:, 0, 0])
    # Kolmogorov's statistic; its 99.9 % quantile is 1.95.
    empirical = torch.arange(1, len(angles) + 1) / len(angles)
    uniform = (angles.sort().values + math.pi) / (2 * math.pi)
    assert (empirical - uniform).abs().max() * len(angles) ** 0.5 < 1.95
    halved = (angles.sort().values / 2 + math.pi) / (2 * math.pi)
    assert (empirical - halved).abs().max() * len(angles) ** 0.5 > 1.95, "the test cannot tell"


def test_all_signed_orders_of_planes_occur_equally_often():
    group = MatrixGroup(4, "none", PLANES, movable=True)
    moves = group.matrices(group.random(2000, generator(10)), "planes")
    signs, orders = moves.sum(-1), moves[:, 0, 0] != 0
    assert torch.equal(moves.abs().sum(-1), torch.ones(2000, 2).double())
    cells = torch.stack([signs[:, 0] > 0, signs[:, 1] > 0, orders]).long().T @ torch.tensor([1, 2, 4])
    counts = torch.bincount(cells, minlength=8)
    # χ² of 7 degrees of freedom; its 99.9 % quantile is 24.3.
    assert ((counts - 250) ** 2 / 250).sum() < 24.3


@over(GROUPS)
def test_special_elements_have_a_path(group):
    element = draw(group, 11, special=True)
    identity = group.identity(copies_of(group))
    assert difference(group.path(element, 0.0), identity) <= TIGHT
    assert difference(group.path(element, 1.0), element) <= TIGHT
    near, middle = group.path(element, 0.5 - 1e-6), group.path(element, 0.5)
    assert difference(near, middle) < 1e-4, "the path jumps"
    moved = difference(middle, identity) > 0.01
    assert moved == (group.dimension > 0)


@over({name: group for name, group in GROUPS.items() if not isinstance(group, Translations)})
def test_elements_of_another_component_have_no_path(group):
    refused = 0
    for seed in range(12):
        try:
            group.path(group.random(1, generator(seed)), 0.5)
        except ValueError as error:
            assert "special=True" in str(error)
            refused += 1
    components = not isinstance(group, MatrixGroup) or bool(group.rest) or group.movable
    assert (refused > 0) == components


@over(GROUPS)
def test_exp_inverts_log(group):
    checked = 0
    for seed in range(12):
        element = group.random(1, generator(seed), special=True)
        try:
            logarithm = group.log(element)
        except ValueError as error:
            # In GL(n) an element may have a path and no logarithm.
            assert getattr(group, "stretch", None) == "free" and "`element` has no real principal logarithm" in str(
                error
            )
            continue
        assert difference(group.exp(logarithm), element) <= TIGHT
        if isinstance(group, MatrixGroup):
            assert difference(group.project(logarithm), logarithm) <= TIGHT, "not in the algebra"
        checked += 1
    assert checked >= 6


@over(GROUPS)
def test_log_inverts_exp(group):
    algebra = small_algebra(group, copies_of(group))
    assert difference(group.log(group.exp(algebra)), algebra) <= TIGHT
    assert (difference(group.exp(algebra), group.identity(copies_of(group))) > 0.01) == (group.dimension > 0)


@over({name: group for name, group in GROUPS.items() if getattr(group, "stretch", None) != "free"})
def test_paths_are_one_parameter_groups(group):
    element = draw(group, 12, special=True)
    for t in (0.25, -1.0):
        assert difference(group.path(element, t), group.exp(t * group.log(element))) <= TIGHT


def test_what_has_no_logarithm_in_the_general_linear_group():
    group, stretched_half_turn, mirror = general_linear(2), *torch.tensor([[-1.0, -2.0], [-1.0, 2.0]]).double()
    stretched_half_turn, mirror = torch.diag(stretched_half_turn)[None], torch.diag(mirror)[None]
    with pytest.raises(ValueError, match="`element` has no real principal logarithm, as it has negative eigenvalues"):
        group.log(stretched_half_turn)
    assert difference(group.path(stretched_half_turn, 1.0), stretched_half_turn) <= TIGHT
    with pytest.raises(ValueError, match="`element` has no real principal logarithm"):
        group.log(mirror)
    with pytest.raises(ValueError, match="`rotation` must have determinant \\+1"):
        group.path(mirror, 0.5)


def test_moved_planes_have_neither_path_nor_logarithm():
    group = MatrixGroup(4, "none", PLANES, movable=True)
    for order, mirrored in (([1, 0], [False, False]), ([0, 1], [True, False]), ([0, 1], [True, True])):
        element = group.moved_planes(torch.tensor(order), torch.tensor(mirrored))[None]
        assert distance_from(group, element[0]) <= TIGHT
        for refused in (lambda element=element: group.path(element, 0.5), lambda element=element: group.log(element)):
            with pytest.raises(ValueError, match="`element` exchanges or mirrors planes"):
                refused()


def test_exchanged_heads_and_neurons_have_no_path():
    with pytest.raises(ValueError, match="`element` exchanges heads"):
        HeadPermutations(2, 1).path(torch.tensor([[1, 0]]), 0.5)
    group, ones = NeuronGroup(2, 1, True), torch.ones(2)
    for order, linear in ((torch.tensor([1, 0]), ones), (torch.tensor([0, 1]), -ones)):
        for refused in (group.log, lambda element: group.path(element, 0.5)):
            with pytest.raises(ValueError, match="`element` exchanges neurons or turns their sign"):
                refused(group.element(order, ones, linear))


@over(MATRIX_GROUPS)
def test_the_dimension_is_the_rank_of_the_projection_on_the_algebra(group):
    n = group.n
    basis = torch.eye(n * n, dtype=torch.float64).reshape(n * n, n, n)
    images = group.project(basis)
    assert torch.linalg.matrix_rank(images.reshape(n * n, -1)) == group.dimension
    assert difference(group.project(images), images) <= TIGHT, "no projection"
    # The nearest element: what is taken away is orthogonal to all that is kept.
    assert ((basis - images).reshape(n * n, -1) @ images.reshape(n * n, -1).T).abs().max() <= TIGHT
    shear = torch.zeros(n, n, dtype=torch.float64)
    shear[0, -1] = 1
    whole = group.stretch == "free" and not group.planes
    stays = whole or (n == 1 and group.stretch == "common")
    assert (difference(group.project(shear[None])[0], shear) <= 0.1) == stays


@over(MATRIX_GROUPS)
def test_the_algebra_is_closed_under_commutators(group):
    a, b = (small_algebra(group, 2, seed) for seed in (13, 14))
    commutator = a @ b - b @ a
    assert difference(group.project(commutator), commutator) <= TIGHT


@over(NEURON_GROUPS)
def test_the_dimension_is_the_number_of_scalings_that_do_something(group):
    ones = torch.ones(group.n, 1, dtype=torch.float64)
    roles = ["active", "down", *(["linear"] if group.gated else [])]
    basis = torch.eye(2 * group.n, dtype=torch.float64).reshape(-1, 2, group.n)
    images = [
        torch.cat([group.act(group.exp(direction[None]), role, ones).log() for role in roles]).flatten()
        for direction in basis
    ]
    assert torch.linalg.matrix_rank(torch.stack(images)) == group.dimension


@over(SIGN_GROUPS)
def test_half_turns_are_all_that_commutes_with_gains_and_rotary_positions(group):
    """A sign for each plane and each dimension outside; the signs of both dimensions of a plane are one."""
    elements = torch.cat([group.random(40, generator(seed)) for seed in (1, 2)])
    assert torch.equal(elements.abs(), group.identity(80))
    assert len(elements.unique(dim=0)) > min(2 ** (len(group.planes) + len(group.rest)), 80) / 2
    angles = torch.arange(1, len(group.planes) + 1, dtype=torch.float64)
    rotation = plane_rotation(group, angles)
    for signs in elements:
        assert torch.equal(signs.diag() @ rotation, rotation @ signs.diag())
    if group.planes:
        alone = group.identity()[0]
        alone[group.planes[0][0]] = -1
        assert difference(alone.diag() @ rotation, rotation @ alone.diag()) > 0.01


@over(GAIN_GROUPS)
def test_scalings_of_gains_stay_in_bounds_and_have_their_dimension(group):
    *others, queries, keys = group.random(40, generator(8)).unbind(1)
    assert all(torch.equal(other.abs(), queries.abs()) and not torch.equal(other, queries) for other in others)
    assert ((queries * keys).abs() - 1).abs().max() <= TIGHT
    assert queries.abs().max() <= SPREAD and queries.abs().min() >= 1 / SPREAD
    assert (queries.abs() - 1).abs().max() > 0.1 or group.stretch == "none"
    assert all((side < 0).any() and (side > 0).any() for side in (queries, keys))
    logarithms = group.exp(torch.eye(group.dimension, dtype=torch.float64)).log().flatten(1)
    assert torch.linalg.matrix_rank(logarithms) == group.dimension if group.dimension else not logarithms.numel()
    for first, second in group.planes:
        assert torch.equal(queries[:, first].abs(), queries[:, second].abs())


@over(TRANSLATIONS)
def test_translations_move_only_what_is_free(group):
    assert torch.linalg.matrix_rank(group.project(torch.eye(group.n))) == group.dimension
    element = draw(group, 15)
    free = torch.zeros(group.n, dtype=torch.bool)
    free[list(range(group.n) if group.free is None else group.free)] = True
    assert (element[:, ~free] == 0).all() and (element[:, free] != 0).all()


def test_groups_name_themselves():
    assert str(orthogonal(5)) == "O(5)" and str(general_linear(4)) == "GL(4)"
    assert str(MatrixGroup(3, "common")) == "R+ x O(3)"
    assert str(MatrixGroup(7, "free", PLANES)) == "GL(1,C)^2 x GL(3)"
    assert str(MatrixGroup(4, "none", PLANES, movable=True)) == "U(1)^2 x signed permutations of 2 planes"
    assert str(NeuronGroup(6, 1, True)) == "S6 x (R+)^6 x (R*)^6" and str(NeuronGroup(6)) == "S6"
    assert str(HeadPermutations(3, 2)) == "S2 wr S3" and str(HeadPermutations(4, 1)) == "S4"
    assert str(Translations(5, (1, 4))) == "R^2"
    assert str(HalfTurns(7, PLANES)) == "{1,-1}^5"
    assert str(GainScalings(7, "free", PLANES)) == "(R+)^5 x {1,-1}^14"
    assert str(GainScalings(7, "none", PLANES)) == "{1,-1}^14"
    assert str(GainScalings(7, "free", PLANES, repeats=3)) == "(R+)^5 x {1,-1}^28"
