"""A model that the representation leaves alone has the symmetry, in any frame; and only such a model."""

import copy
import json

import pytest
import torch

from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.contraction import weights_of
from rigpt_hf.symmetry.tokens import OrderError, Representation, TokenSymmetry, symmetrize, symmetry_error
from rigpt_hf.symmetry.tokens.filling import Filling
from tests.models import ALL, COVER, over, tiny_config, tiny_model, tokens
from tests.symmetry.options import difference, generator
from tests.symmetry.tokens.groups import SYMMETRIES, VOCABULARY
from tests.tolerances import SYMMETRY


TOLERANCE = SYMMETRY[torch.float64]
# Every option set meets some group.
PAIRED = dict(zip(COVER, [name for _ in COVER for name in SYMMETRIES], strict=False))


def represented(option: str, name: str, **options):
    """A random model of an option set, and a representation for it."""
    model = tiny_model(**ALL[option] | options)
    return model, Representation.choose(model.config, SYMMETRIES[name]())


def far(a: dict, b: dict) -> float:
    """The largest difference of two states."""
    return max(float((tensor.double() - b[name].double()).abs().max()) for name, tensor in a.items())


def group_mean(representation: Representation, weights: dict) -> dict:
    """The mean of `π ρ` over all elements, one by one."""
    made = representation.symmetry.group._listed[1]
    states = [weights]
    for before, number in made[1:]:
        states.append(representation.act(int(number), states[int(before)]))
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in weights}


# Options with more than one frame of the stream, or with one that is no free choice.
APART = {"local_frames", "post_norm"}


@over(COVER, ALL)
def test_the_projection_is_the_mean_over_the_group(option):
    if apart := APART & ALL[option].keys():
        with pytest.raises(ValueError, match=f"`{min(apart)}=True`"):
            represented(option, "cyclic")
        return
    model, representation = represented(option, PAIRED.get(option, "symmetric"))
    weights = weights_of(model)
    projected = representation.project_state(weights)
    assert far(projected, group_mean(representation, weights)) < TOLERANCE
    assert far(representation.project_state(projected), projected) < TOLERANCE, "not idempotent"
    inner = sum(float(((weights[name] - projected[name]) * projected[name]).sum()) for name in weights)
    assert abs(inner) < TOLERANCE * sum(float(tensor.square().sum()) for tensor in weights.values())
    for number in range(len(representation.transformations)):
        assert far(representation.act(number, projected), projected) < TOLERANCE
    assert far(projected, weights) > 0.1, "everything was symmetric before"
    turned = [name for name in weights if not torch.equal(projected[name], weights[name])]
    assert len(turned) > len(weights) / 2


@over(COVER, ALL)
@torch.no_grad()
def test_what_is_projected_has_the_symmetry_as_a_function(option):
    if APART & ALL[option].keys():
        return
    name = PAIRED.get(option, "symmetric")
    model, representation = represented(option, name)
    inputs, symmetry = tokens(2, 12), representation.symmetry
    moved = symmetry.points.tolist()
    inputs[0, :8] = torch.tensor(moved)[torch.randint(len(moved), (8,), generator=generator(1))]
    before = symmetry_error(model, symmetry, inputs)
    symmetric = symmetrize(model, representation)
    after = symmetry_error(symmetric, symmetry, inputs)
    assert after.max < TOLERANCE and after.mean < TOLERANCE < 1e-2 < before.mean < before.max
    # Norms are kept, and another exchange is no symmetry.
    for old, new in zip(model.parameters(), symmetric.parameters(), strict=True):
        assert abs(old.norm() - new.norm()) < TOLERANCE * old.norm() or new.norm() == 0
    other = TokenSymmetry(VOCABULARY, [[[moved[0], 3]]])
    assert symmetry_error(symmetric, other, inputs).max > 1e-3
    assert representation.distance(symmetric) < TOLERANCE < 0.1 < representation.distance(model)


@pytest.mark.parametrize("name", SYMMETRIES)
@pytest.mark.by_default(2)
def test_a_representation_turns_with_the_model(name):
    """`P` of the conjugated representation is `h P h⁻¹`, and the mean over the group of the conjugated one."""
    option = "learned-untied-projected"
    model, representation = represented(option, name)
    h = GaugeTransformation.random(model.config, generator(4), "all")
    turned = representation.conjugated(h)
    weights = weights_of(model)
    moved = h.state_dict(weights)
    expected = h.state_dict(representation.project_state(weights))
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert far(turned.project_state(moved), expected) < TOLERANCE * scale
    assert far(group_mean(turned, moved), expected) < TOLERANCE * scale
    assert far(representation.project_state(moved), expected) > 1e-2
    twice = turned.conjugated(h.inverse())
    assert far(twice.project_state(weights), representation.project_state(weights)) < TOLERANCE


def test_the_wrong_order_is_no_projection():
    """The mean of `ρ(g)⁻¹ π(g)` is one for abelian groups only."""
    for name, is_projection in (("cyclic", True), ("symmetric", False)):
        model, representation = represented("learned", name)
        symmetry = representation.symmetry
        inverses = [one.inverse() for one in representation.transformations]
        weights = {"model.embed_tokens.weight": weights_of(model)["model.embed_tokens.weight"]}

        def mean(state, made=symmetry.group._listed[1], representation=representation, inverses=inverses):
            # ρ(g)⁻¹ of a product is the product of inverses in the other order.
            terms, undo = [state], [GaugeTransformation.identity(representation.config)]
            moved = [state]
            for before, number in made[1:]:
                moved.append(representation.relabelled_state(int(number), moved[int(before)]))
                undo.append(undo[int(before)] @ inverses[int(number)])
                terms.append(undo[-1].state_dict(moved[-1]))
            return {name: torch.stack([term[name] for term in terms]).mean(0) for name in state}

        once = mean(weights)
        assert (far(mean(once), once) < TOLERANCE) == is_projection


def test_gains_that_differ_inside_an_irreducible_break_it():
    model, representation = represented("learned", "symmetric")
    symmetric = symmetrize(model, representation)
    inputs = tokens(2, 12)
    blocks = {reference.dim for reference in representation.decomposition.references}
    assert blocks == {1, 2}
    for last, breaks in ((0, False), (-1, True)):
        changed = copy.deepcopy(symmetric)
        with torch.no_grad():  # as a gain behind a norm would; the trivial irreducible is first
            for name, parameter in changed.named_parameters():
                if name.endswith(("q_proj.weight", "up_proj.weight")):
                    parameter[:, last] *= 1.5
        assert (symmetry_error(changed, representation.symmetry, inputs).max > 1e-3) == breaks


def test_large_groups_are_represented_by_permutations():
    symmetry = TokenSymmetry.named("symmetric", [range(5, 17), range(20, 32)], VOCABULARY)
    model = tiny_model(**ALL["learned"])
    representation = Representation.choose(model.config, symmetry, kind="permutation")
    symmetric = symmetrize(model, representation)
    assert symmetry_error(symmetric, symmetry, tokens(2, 12)).max < TOLERANCE
    assert representation.distance(symmetric) < TOLERANCE < representation.distance(model)
    small = TokenSymmetry.named("symmetric", [range(5, 8), range(20, 23)], VOCABULARY)
    listed = Representation.choose(model.config, small, kind="permutation", resting=0.25)
    weights = weights_of(model)
    assert far(listed.project_state(weights), group_mean(listed, weights)) < TOLERANCE
    # By orbits of pairs it is the same as by the list.
    listed.decomposition.listed = False
    assert far(listed.project_state(weights), group_mean(listed, weights)) < TOLERANCE


@torch.no_grad()
def test_the_subspace_has_as_many_dimensions_as_are_free():
    """Counted by the rank of the projection of each parameter of a small model."""
    for name in ("quaternions", "symmetric"):
        model = tiny_model(**ALL["learned"] | {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8})
        representation = Representation.choose(model.config, SYMMETRIES[name]())
        total = 0
        for parameter_name, parameter in model.named_parameters():
            units = torch.eye(parameter.numel(), dtype=torch.float64).view(-1, *parameter.shape)
            if representation.table.rank(parameter_name) == 1:
                projected = torch.stack([representation.project(parameter_name, unit) for unit in units])
            else:
                projected = representation.project(parameter_name, units)
            trace = projected.flatten(1).trace()
            total += round(float(trace))
            assert abs(trace - trace.round()) < TOLERANCE * parameter.numel()
        assert total == representation.free_parameters(model) < model.num_parameters() / 2


@pytest.mark.parametrize("kind", ["irreducible", "permutation"])
def test_it_can_be_written_in_few_numbers(kind):
    model = tiny_model(**ALL["learned"])
    representation = Representation.choose(model.config, SYMMETRIES["symmetric"](), kind=kind, resting=0.3)
    content = json.loads(json.dumps(representation.filling.to_dict()))
    again = Representation.filled(model.config, SYMMETRIES["symmetric"](), Filling.from_dict(content))
    for one, other in zip(representation.transformations, again.transformations, strict=True):
        assert one.elements.keys() == other.elements.keys() and len(one.elements) > 6
        assert all(torch.equal(element, other.elements[name]) for name, element in one.elements.items())


def test_multiplicities_may_be_given():
    config = tiny_config(**ALL["learned"])
    representation = Representation.choose(config, SYMMETRIES["symmetric"](), multiplicities={"stream": [10, 2, 10]})
    axis = representation.axes("model.embed_positions.weight", (48, 32))[1]
    assert axis.multiplicities == {0: 10, 1: 2, 2: 10}


@torch.no_grad()
def test_parameters_that_turn_alike_are_projected_together():
    model, representation = represented("learned", "conjugations")
    expected = representation.project_state(weights_of(model))
    representation.project_tensors_(dict(model.named_parameters()))
    assert far(weights_of(model), expected) < TOLERANCE
    assert difference(model, symmetrize(model, representation)) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "free"}, "`kind` must be irreducible or permutation, got 'free'"),
        ({"resting": 1.0}, "`resting` must be at least 0 and below 1, got 1.0"),
        (
            {"multiplicities": {"stream": [32]}},
            r"irreducibles of dimensions \[1, 1, 2\], .* the 32 of stream, got .32.",
        ),
        ({"multiplicities": {"stream": [2, 2, 13]}}, "which fill 30"),
        ({"multiplicities": {"neurons": [128]}}, "got 'neurons'. Here these are stream, head_qk, head_vo"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Representation.choose(tiny_config(**ALL["learned"]), SYMMETRIES["symmetric"](), **options)


def test_other_refusals():
    config = tiny_config(**ALL["learned"])
    symmetry = SYMMETRIES["symmetric"]()
    large = TokenSymmetry.named("symmetric", [range(5, 17)], VOCABULARY)
    with pytest.raises(OrderError, match="must be represented by permutations, got other matrices"):
        representation = Representation.choose(config, large, kind="permutation")
        turned = GaugeTransformation.random(config, generator(), ["stream"])
        conjugated = [turned @ one @ turned.inverse() for one in representation.transformations]
        Representation(large, conjugated).project_state(weights_of(tiny_model(**ALL["learned"])))
    with pytest.raises(ValueError, match="`symmetry` must have generators, got one without"):
        Representation.trivial(config, TokenSymmetry(VOCABULARY, []))
    with pytest.raises(ValueError, match="one for each of the 2 generators, got 1"):
        Representation(symmetry, [GaugeTransformation.identity(config)])
    with pytest.raises(ValueError, match="of the model's vocabulary, got 61 tokens for a table of 50"):
        Representation.choose(tiny_config(**ALL["learned"] | {"vocab_size": 50}), symmetry)
