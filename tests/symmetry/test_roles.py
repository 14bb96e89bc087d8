"""What elements do to tensors: every role is a homomorphism, and together they keep what they are there to keep."""

import torch

from rigpt_hf.groups import GainScalings, HalfTurns
from rigpt_hf.symmetry import HeadPermutations, MatrixGroup, NeuronGroup
from tests.symmetry.test_groups import (
    GAIN_GROUPS,
    HEAD_GROUPS,
    MATRIX_GROUPS,
    NEURON_GROUPS,
    PLANES,
    SIGN_GROUPS,
    TIGHT,
    copies_of,
    difference,
    draw,
    gaussian,
    generator,
    over,
    plane_rotation,
    small_algebra,
)


def carried(group) -> dict[str, torch.Tensor]:
    """A tensor for every role that the group has."""
    copies, columns, repeats = copies_of(group), 3, 2
    match group:
        case HeadPermutations():
            heads = group.key_value_heads
            sizes = {"query": heads * group.repeats * 5, "key_value": heads * 5}
        case HalfTurns():
            sizes = {role: copies * repeats * group.n for role in ("vector", "covector", "metric")}
        case GainScalings():
            sizes = {role: copies * repeats * group.n for role in group.ROLES}
            sizes |= {"metric": copies * repeats} if group.stretch == "common" else {}
        case NeuronGroup():
            sizes = dict.fromkeys(("active", "linear", "down"), copies * group.n)
        case MatrixGroup():
            sizes = {role: copies * repeats * group.n for role in ("vector", "covector")}
            # Weights of |covector|² make sense only where no direction is stretched more than another.
            sizes |= {"metric": copies * repeats} if group.stretch != "free" else {}
            sizes |= {"planes": copies * len(group.planes)} if group.planes else {}
    return {role: gaussian(size, columns, seed=100 + index) for index, (role, size) in enumerate(sizes.items())}


@over(MATRIX_GROUPS | HEAD_GROUPS | NEURON_GROUPS | SIGN_GROUPS | GAIN_GROUPS)
def test_every_role_is_a_homomorphism(group):
    changed = 0
    for seed in (16, 17, 18):
        a, b = draw(group, seed), draw(group, seed + 10)
        for role, tensor in carried(group).items():
            in_turn = group.act(a, role, group.act(b, role, tensor))
            assert difference(group.act(group.product(a, b), role, tensor), in_turn) <= TIGHT, role
            assert difference(group.act(group.inverse(a), role, group.act(a, role, tensor)), tensor) <= TIGHT, role
            identity = group.identity(copies_of(group))
            assert torch.equal(group.act(identity, role, tensor), tensor), role
            changed += difference(group.act(a, role, tensor), tensor) > 0.01
    assert changed


@over(MATRIX_GROUPS)
def test_roles_do_not_commute_with_the_wrong_order(group):
    """Negative control of the homomorphism: where the group is not abelian, `product(b, a)` is another element."""
    a, b = draw(group, 16), draw(group, 26)
    vectors = carried(group)["vector"]
    in_turn = group.act(a, "vector", group.act(b, "vector", vectors))
    abelian = not group.movable and (len(group.rest) < 2)
    assert (difference(group.act(group.product(b, a), "vector", vectors), in_turn) <= 0.01) == abelian


@over(MATRIX_GROUPS)
def test_vectors_and_covectors_pair_to_invariants(group):
    element = draw(group, 19)
    shape = (3 * 2, group.n, 3)  # copies and repeats, frame, rest
    vector, covector = (gaussian(3 * 2 * group.n, 3, seed=seed) for seed in (20, 21))
    turned, against = group.act(element, "vector", vector), group.act(element, "covector", covector)

    def paired(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.reshape(shape) * b.reshape(shape)).sum(1)

    assert difference(paired(turned, against), paired(vector, covector)) <= TIGHT
    assert difference(turned, vector) > 0.01
    if group.stretch == "none":
        assert difference(paired(turned, turned), paired(vector, vector)) <= TIGHT
    else:
        assert difference(paired(turned, turned), paired(vector, vector)) > 0.01, "lengths stayed"


@over({name: group for name, group in MATRIX_GROUPS.items() if group.stretch != "free"})
def test_the_metric_weighs_the_square_of_covectors(group):
    element = draw(group, 22)
    covector = gaussian(3 * 2 * group.n, 1, seed=23)
    weight = gaussian(3 * 2, 1, seed=24)

    def weighed(weights: torch.Tensor, covectors: torch.Tensor) -> torch.Tensor:
        return weights * covectors.reshape(-1, group.n).square().sum(1, keepdim=True)

    after = group.act(element, "covector", covector)
    assert difference(weighed(group.act(element, "metric", weight), after), weighed(weight, covector)) <= TIGHT
    assert (difference(weighed(weight, after), weighed(weight, covector)) > 0.01) == (group.stretch == "common")


@over({name: group for name, group in MATRIX_GROUPS.items() if group.planes})
def test_frequencies_move_with_their_planes(group):
    moved = 0
    for seed in range(6):
        (element,) = group.random(1, generator(seed))
        frequencies = gaussian(len(group.planes), 1, seed=seed)
        after = group.act(element[None], "planes", frequencies)
        before_and_after = (plane_rotation(group, f[:, 0]) for f in (frequencies, after))
        before, turned = before_and_after
        assert difference(turned @ element, element @ before) <= TIGHT
        moved += not torch.equal(after, frequencies)
        if not torch.equal(after, frequencies):
            assert difference(before @ element, element @ before) > 0.01
    assert (moved > 0) == group.movable


def relu2(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


ACTIVATIONS = {None: torch.nn.functional.gelu, 1: torch.relu, 2: relu2}


@over(NEURON_GROUPS)
def test_the_scalings_of_neurons_leave_the_mlp_alone(group):
    element = draw(group, 25)
    rows = copies_of(group) * group.n
    active, linear, down = (gaussian(rows, 4, seed=seed) for seed in (26, 27, 28))
    x = gaussian(9, 4, seed=29)

    def mlp(act, active: torch.Tensor, linear: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        neurons = act(x @ active.T)
        return (neurons * (x @ linear.T) if group.gated else neurons) @ down

    before = {"active": active, "linear": linear, "down": down}
    after = {role: group.act(element, role, tensor) for role, tensor in before.items()}
    act = ACTIVATIONS[group.degree]
    assert difference(mlp(act, **after), mlp(act, **before)) <= TIGHT
    assert difference(after["active"], active) > 0.1
    # A function with no such scaling tells whether there was one.
    other = torch.nn.functional.silu
    assert (difference(mlp(other, **after), mlp(other, **before)) > 0.01) == (group.degree is not None)
    # All columns are taken along: none of the three roles may be left out.
    assert difference(mlp(act, **(after | {"down": down})), mlp(act, **before)) > 0.01


def gained(tensors: dict[str, torch.Tensor], weight: torch.Tensor, planes: tuple, angle: float) -> torch.Tensor:
    """Scores `q·k - λ|k|²/2` of one head behind norms with gains and biases, queries turned by an angle per plane."""
    rotation = plane_rotation(MatrixGroup(7, planes=planes), angle * torch.arange(1.0, 1 + len(planes)).double())
    query, key = (
        tensors[f"{of}_gain"] * torch.nn.functional.rms_norm(tensors[f"{of}_rows"].T, (7,), eps=0.1)
        + tensors[f"{of}_bias"]
        for of in ("query", "key")
    )
    return query @ rotation.T @ key.T - weight * key.square().sum(1) / 2


@over({"free": ("free", 0.0), "common": ("common", 0.4), "signs": ("none", 0.4)})
def test_gains_are_scaled_where_no_score_sees_it(case):
    """Negative controls: a role that is left out, a scaling of one dimension of a plane, one that lengths know."""
    stretch, weight = case
    group = GainScalings(7, stretch, PLANES)
    tensors = {role: gaussian(7, 5, seed=50 + index) for index, role in enumerate(group.ROLES)}
    tensors |= {role: tensors[role][:, 0] for role in group.ROLES if not role.endswith("rows")}
    weights = torch.tensor([weight], dtype=torch.float64)

    def after(element, roles=tuple(group.ROLES), group=group):
        moved = {role: group.act(element, role, tensors[role].reshape(7, -1)) for role in roles}
        moved = {role: value.reshape(tensors[role].shape) for role, value in moved.items()}
        return gained(tensors | moved, group.act(element, "metric", weights[:, None])[0], PLANES, 0.7)

    element, expected = group.random(1, generator(3)), gained(tensors, weights, PLANES, 0.7)
    assert difference(after(element), expected) <= TIGHT
    for role in group.ROLES:
        if stretch == "none" and role.endswith("bias"):
            continue  # which signs leave alone
        others = tuple(other for other in group.ROLES if other != role)
        assert difference(after(element, others), expected) > 0.01, role
    single = group.identity()
    single[0, :, PLANES[0][0]] = torch.tensor([2.0, 0.5])
    assert difference(after(single), expected) > 0.01
    if stretch != "free":
        free = GainScalings(7, "free", PLANES)
        assert difference(after(free.random(1, generator(3)), group=free), expected) > 0.01


@over(HEAD_GROUPS)
def test_query_heads_stay_with_their_key_value_head(group):
    heads = torch.arange(group.key_value_heads).double()[:, None]
    served = heads.repeat_interleave(group.repeats, dim=0)
    for seed in range(6):
        element = draw(group, seed)
        moved = group.act(element, "key_value", heads)
        assert torch.equal(group.act(element, "query", served), moved.repeat_interleave(group.repeats, dim=0))
        assert torch.equal(element.sort().values, group.identity())


@over(MATRIX_GROUPS | NEURON_GROUPS | {name: group for name, group in GAIN_GROUPS.items() if group.dimension})
def test_generators_are_the_derivative_of_the_action(group):
    """For every role at once, `generator` is the gradient of `Σ a · act(exp X) b` at X = 0 along the algebra."""
    copies = copies_of(group)
    algebra = torch.zeros_like(small_algebra(group, copies)).requires_grad_()
    total, contractions = torch.zeros(()), {}
    for index, (role, moved) in enumerate(carried(group).items()):
        covariant = gaussian(*moved.shape, seed=30 + index)
        total = total + (covariant * group.act(group.exp(algebra), role, moved)).sum()
        contractions[role] = group.gram(role, covariant, moved, copies)
    (gradient,) = torch.autograd.grad(total, algebra)
    expected = group.project(gradient) if isinstance(group, MatrixGroup) else gradient
    assert difference(group.generator(contractions), expected) <= TIGHT
    assert (expected.abs().max() > 0.01) == (group.dimension > 0)
