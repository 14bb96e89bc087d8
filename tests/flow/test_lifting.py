"""Feedforward gauge transformations lifted to paths of diffeomorphisms, and the diagram that has to commute."""

import functools
import itertools

import pytest
import scipy.linalg
import torch
from torch import Tensor

from rigpt_hf.flow.diffeomorphism import end_deviation, flow, flow_difference, trajectory, transform_field
from rigpt_hf.flow.lifting import (
    JoiningPath,
    Layer,
    LiftPath,
    affine_map,
    commutation_errors,
    doubled,
    field_of_path,
    leaky_relu_map,
    lift,
    network_field,
    piecewise_field,
    smooth_rate,
    smooth_step,
)
from rigpt_hf.pictures import lifting as pictures
from rigpt_hf.symmetry import haar
from tests.flow.test_diffeomorphism import EXACT, FINE, FLOW, ROUGH, normal
from tests.models import over


ONE = torch.eye(3, dtype=torch.float64)
CYCLE, SWAP = ONE[[1, 2, 0]], ONE[[1, 0, 2]]
SCALING = torch.diag(torch.tensor([0.5, 2.0, 1.4], dtype=torch.float64))
ROTATION = haar(3, torch.Generator().manual_seed(5), special=True)
# Of the field of two layers.
HALVES = {"jumps": (0.0, 0.5, 1.0, 1.5)}


def run(layers: list[Layer], x: Tensor) -> Tensor:
    return functools.reduce(lambda state, layer: layer(state), layers, x)


def network(slope: float = 0.2, sign: int = 1) -> list[Layer]:
    """Two layers, the last one linear; `sign` of the determinants of both weights."""
    weights = [ONE + normal(3, 3, seed=seed) / 2 for seed in (1, 2)]
    for weight in weights:
        weight[0] *= sign * torch.linalg.det(weight).sign()
    biases = [normal(3, seed=seed) / 2 for seed in (3, 4)]
    return [Layer(weights[0], biases[0], slope), Layer(weights[1], biases[1])]


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


# Name: slope of the first layer, element behind it, whether it takes a double space.
KINDS = {
    "odd permutation": (0.2, SWAP, True),
    "permutation and scaling": (0.2, SCALING @ CYCLE, False),
    "general linear": (1.0, ROTATION @ SCALING @ ROTATION.T @ CYCLE, False),
}


@over(["general linear"], KINDS)
def test_diagram_commutes(option):
    slope, element, double = KINDS[option]
    layers, x, elements = network(slope), normal(4, 3), [ONE, element, ONE]
    errors = commutation_errors(layers, elements, x, double=double, **FINE)
    print(f"{option}: {max(errors):.1e}")
    assert len(errors) == 3 and max(errors) <= FLOW
    # The transformed net is the same function with other weights, and so is the ODE.
    after = [layer.transformed(*ends) for layer, ends in zip(layers, itertools.pairwise(elements), strict=True)]
    assert (run(after, x) - run(layers, x)).abs().max() <= EXACT
    assert (after[0](x) - layers[0](x)).abs().max() > 0.1
    assert (after[0].weight - layers[0].weight).abs().max() > 0.1


def test_diagram_does_not_commute_with_another_element():
    layers, x = network(), normal(4, 3)
    lifted = transform_field(network_field(layers), lift([ONE, CYCLE, ONE]))
    after = [layers[0].transformed(ONE, CYCLE.T), layers[1].transformed(CYCLE.T, ONE)]
    middle, end = trajectory(lifted, x, [0, 1, 2], **ROUGH)[1:]
    assert (middle - after[0](x)).abs().max() > 0.1
    assert (end - run(after, x)).abs().max() <= 1e-2, "both are the same function"
    # Ends that are not the identity: related as by G_L ∘ F ∘ G_0^-1, and another function.
    elements = [ROTATION, CYCLE, SCALING]
    assert max(commutation_errors(layers, elements, x, **FINE)) <= FLOW
    assert end_deviation(lift(elements), x, 0, 2) > 0.1


@pytest.mark.full
def test_halfway_the_flow_stays_and_the_net_does_not():
    layers, x = network(), normal(4, 3)
    half = LiftPath([ONE, CYCLE])(at(0.5))
    assert not ((half.abs() < 0.1) | (half.abs() > 0.9)).all(), "no permutation"
    assert flow_difference(network_field(layers), lift([ONE, half, ONE]), x, 0, 2, **FINE, **HALVES) <= FLOW
    net = [
        Layer(half @ layers[0].weight, half @ layers[0].bias, layers[0].slope),
        Layer(layers[1].weight @ half.T, layers[1].bias),
    ]
    assert (run(net, x) - run(layers, x)).abs().max() > 0.1
    with pytest.raises(ValueError, match="`after` must be a permutation times a positive scaling.*linear layers only"):
        layers[0].transformed(ONE, half)
    # Where the layer is linear, half-way is as good as any point.
    linear = network(slope=1.0)
    after = [linear[0].transformed(ONE, half), linear[1].transformed(half, ONE)]
    assert (run(after, x) - run(linear, x)).abs().max() <= EXACT


@pytest.mark.parametrize("element", [SWAP, -ONE, SWAP @ SCALING], ids=["swap", "minus one", "swap and scaling"])
def test_negative_determinants_have_no_path_but_in_the_double(element):
    with pytest.raises(ValueError, match=r"got \+1 for elements\[0\] and -1 for elements\[1\].*`double=True`"):
        lift([ONE, element, ONE])
    with pytest.raises(ValueError, match="`element` must have a positive determinant.*`doubled`"):
        JoiningPath(element)
    # What the refusal is about: on the straight way the determinant passes through 0.
    straight = [torch.linalg.det((1 - s) * ONE + s * element) for s in torch.linspace(0, 1, 101)]
    assert min(straight) < 0 < max(straight)
    path = LiftPath([ONE, element, ONE], double=True)
    for t in torch.linspace(0, 2, 21, dtype=torch.float64):
        assert torch.linalg.det(path(t)) > 0.1
    assert (path(at(1.0)) - doubled(element)).abs().max() <= EXACT
    assert (path(at(1.0))[:3, :3] - element).abs().max() <= EXACT and path(at(1.0))[3, 3] < -0.9
    # Half-way it leaves the space of x, or it would not have got round.
    assert path(at(0.5))[3:, :3].abs().max() > 0.1
    # Both in the other component: a path joins them, and no end is the identity.
    between = LiftPath([element, SCALING @ element])
    assert torch.linalg.det(between(at(0.5))) < 0
    assert (between(at(1.0)) - SCALING @ element).abs().max() <= EXACT


def test_path_goes_through_the_elements_and_rests_there():
    elements = [ONE, SCALING @ CYCLE, ROTATION, ROTATION, ONE]
    path = LiftPath(elements)
    for index, element in enumerate(elements):
        value, velocity = torch.func.jvp(path, (at(float(index)),), (at(1.0),))
        assert (value - element).abs().max() <= EXACT and velocity.abs().max() <= EXACT
        for side in (-1e-4, 1e-4):
            assert (path(at(index + side)) - element).abs().max() <= 1e-9, "of third order"
    speeds = [torch.func.jvp(path, (at(t),), (at(1.0),))[1].abs().max() for t in (0.5, 1.5, 2.5, 3.5)]
    assert min(speeds[:2]) > 0.1 and speeds[2] <= EXACT and speeds[3] > 0.1
    for outside, end in ((-1.0, ONE), (9.0, ONE)):
        assert (path(at(outside)) - end).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["lift", "double lift", "affine", "leaky"])
def test_closed_form_of_the_tangent_is_the_derivative(name):
    map = {
        "lift": lift([ONE, SCALING @ CYCLE @ ROTATION, ROTATION]),
        "double lift": lift([ONE, SWAP @ SCALING, ONE], double=True),
        "affine": affine_map(SCALING @ CYCLE, normal(3)),
        "leaky": leaky_relu_map(0.2, 2),
    }[name]
    size = 6 if name == "double lift" else 3
    x, v = normal(4, size), normal(4, size, seed=1)
    for t in (0.0, 0.3, 0.8):
        exact = torch.func.jvp(map.space, (at(t), x), (at(1.0), v))[1]
        assert map.tangent is not None and (map.push(at(t), x, v) - exact).abs().max() <= EXACT
        assert t == 0 or (map.push(at(t), x, v) - map.push(at(t), x, 0 * v)).abs().max() > 0.1
        assert t == 0 or map.push(at(t), x, 0 * v).abs().max() > 0.1
        image = map.space(at(t), x)
        assert (map.invert_space(at(t), image) - x).abs().max() <= EXACT


def test_kinds_of_paths():
    rotation, scaling = JoiningPath(CYCLE), JoiningPath(SCALING)
    for s in torch.linspace(0, 1, 5, dtype=torch.float64):
        assert (rotation(s) @ rotation(s).T - ONE).abs().max() <= EXACT
        assert (scaling(s) - torch.diag(SCALING.diagonal() ** s)).abs().max() <= EXACT
        assert (rotation(s) @ rotation(1 - s) - CYCLE).abs().max() <= EXACT, "no geodesic"
    assert (JoiningPath(doubled(SWAP))(at(1.0)) - doubled(SWAP)).abs().max() <= EXACT
    assert smooth_step(at(0.5)) == 0.5 and smooth_step(at(-1.0)) == 0 and smooth_step(at(2.0)) == 1


def test_layers_are_flows():
    layers, x = network(), normal(4, 3)
    states = trajectory(network_field(layers), x, [0, 1, 2], **FINE, **HALVES)
    for state, wanted in zip(states, (x, layers[0](x), run(layers, x)), strict=True):
        assert (state - wanted).abs().max() <= FLOW
    assert (layers[0](x) < 0).any() and (layers[0](x) > 0).any() and (states[1] - states[0]).abs().max() > 0.1
    # Each from nothing by its path: leaky ReLU is a decay of what is below 0.
    leak = field_of_path(leaky_relu_map(0.2))
    rate = torch.func.jvp(smooth_step, (at(0.3),), (at(1.0),))[1]
    assert (rate - smooth_rate(at(0.3))).abs() <= EXACT
    assert (leak(at(0.3), x) - rate * torch.log(at(0.2)) * x.clamp(max=0)).abs().max() <= EXACT
    assert (flow(leak, x, 0, 1, **FINE) - torch.where(x > 0, x, 0.2 * x)).abs().max() <= FLOW
    # Its field commutes with permutations and positive scalings, and not with rotations.
    commutes = lambda g: (leak(at(0.3), x @ g.T) - leak(at(0.3), x) @ g.T).abs().max()  # noqa: E731
    assert commutes(SCALING @ SWAP) <= EXACT and commutes(ROTATION) > 0.1 and commutes(-ONE) > 0.1


def test_a_weight_without_a_real_logarithm_is_a_flow_all_the_same():
    weight = torch.diag(torch.tensor([-1.0, -2.0, 1.0], dtype=torch.float64))
    assert abs(scipy.linalg.logm(weight.numpy()).imag).max() > 3, "a negative eigenvalue alone in its size"
    x, bias = normal(4, 3), normal(3, seed=1)
    found = flow(field_of_path(affine_map(weight, bias)), x, 0, 1, **FINE)
    assert (found - x @ weight.T - bias).abs().max() <= FLOW


def test_weights_of_negative_determinant():
    layers, x = network(sign=-1), normal(4, 3)
    with pytest.raises(ValueError, match=r"`layers\[0\].weight` must have a positive determinant.*keeps orientation"):
        network_field(layers)
    assert max(commutation_errors(layers, [ONE, SWAP, ONE], x, double=True, **FINE)) <= FLOW
    after = [layers[0].transformed(ONE, SWAP), layers[1].transformed(SWAP, ONE)]
    assert (run(after, x) - run(layers, x)).abs().max() <= EXACT


def test_slope_towards_relu():
    # The limit of the layers is ReLU; the field that makes them grows without bound, and at slope 0 there is none.
    x, slopes = normal(20, 3), (1e-2, 1e-4, 1e-8)
    errors = [(Layer(ONE, 0 * ONE[0], slope)(x) - x.relu()).abs().max() for slope in slopes]
    speeds = [field_of_path(leaky_relu_map(slope))(at(0.5), x).abs().max() for slope in slopes]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-7
    assert speeds[1] > 1.9 * speeds[0] and speeds[2] > 1.9 * speeds[1]
    with pytest.raises(ValueError, match="`slope` must be positive, got 0.0: ReLU sends all negative numbers to one"):
        Layer(ONE, ONE[0], 0.0)


def test_residual_nets_lift_as_flows_and_not_as_euler_steps():
    up, down = normal(3, 3, seed=7) / 2, normal(3, 3, seed=8) / 2
    blocks = [lambda x: torch.tanh(x @ up.T), lambda x: torch.tanh(x @ down.T) - x / 2]
    elements, x = [ONE, ROTATION, ONE], normal(4, 3)
    jumps = {"jumps": range(3)}
    field = piecewise_field(blocks)
    lifted = transform_field(field, lift(elements))
    before = trajectory(field, x, [0, 1, 2], **jumps, **FINE)
    after = trajectory(lifted, x, [0, 1, 2], **jumps, **FINE)
    assert (after[1] - before[1] @ ROTATION.T).abs().max() <= FLOW and (after[2] - before[2]).abs().max() <= FLOW
    assert (after[1] - before[1]).abs().max() > 0.1
    # The net itself, in steps of 1.
    net = trajectory(field, x, [0, 1, 2], method="euler", **jumps)
    assert (net[1] - x - blocks[0](x)).abs().max() <= EXACT
    steps = trajectory(lifted, x, [0, 1, 2], method="euler", **jumps)
    assert (steps[1] - net[1] @ ROTATION.T).abs().max() > 0.1, "Euler steps do not see ∂_t Q"
    state = x
    for block, one, other in zip(blocks, elements[:-1], elements[1:], strict=True):
        state = (state + block(state @ one) @ one.T) @ (other @ one.T).T
    assert (state - net[2]).abs().max() <= EXACT, "with the connection on the skip path they do"


def test_arguments():
    layers, x = network(), normal(4, 3)
    with pytest.raises(ValueError, match="`elements` must be at least two, one at each end, got 1"):
        lift([ONE])
    with pytest.raises(ValueError, match=r"`elements\[1\]` must be invertible, got a least singular value of 0"):
        lift([ONE, torch.diag(ONE[0]), ONE])
    with pytest.raises(ValueError, match="`elements` must be one more than `layers`, got 2 and 2"):
        commutation_errors(layers, [ONE, ONE], x)
    for wrong in (ROTATION, -ONE, ONE + SWAP):
        with pytest.raises(ValueError, match="`after` must be a permutation times a positive scaling"):
            commutation_errors(layers, [ONE, wrong, ONE], x)


@pytest.mark.full
def test_figure(monkeypatch):
    monkeypatch.setattr(pictures, "SOLVER", {"rtol": 1e-3, "atol": 1e-5})
    figure = pictures.plot_lifting()
    cycle, errors, determinants, letter = figure.axes
    assert all(panel.get_title() and panel.get_xlabel() and panel.get_ylabel() for panel in figure.axes)
    shown = {line.get_label(): line.get_ydata() for line in errors.get_lines()}
    assert (
        max(
            max(values)
            for label, values in shown.items()
            if label.startswith(("perm", "pos", "rot", "odd")) and "not lifted" not in label
        )
        < 0.01
    )
    assert max(shown["permutations, not lifted (the same function at the end)"]) > 0.1
    signs = {line.get_label(): min(line.get_ydata()) for line in determinants.get_lines()}
    assert signs["of a swap, in the double space"] > 0.99 and signs["straight line to a swap: no lift"] < -0.99
    assert len(letter.collections) > 3 and len(cycle.get_lines()) > 3
