"""Depth as time: the field of the layers, solvers that converge at their orders, frames of interpolated weights."""

import copy

import pytest
import torch
from torchdiffeq import odeint

from rigpt_hf import flow_rigpt
from rigpt_hf.flow.depth import fitted_order, flow_end, layer_field, refinement, trajectory
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.pictures import depth as pictures
from rigpt_hf.pictures import encoded
from rigpt_hf.symmetry import (
    GaugeTransformation,
    canonicalize,
    gauge_distance,
    gauge_error,
    gradient_pairing,
    haar,
    redundant_dimensions,
    table_of,
    to_local_frames,
)
from tests.model.agreement import assert_different, assert_same
from tests.model.test_depth_options import APART, SAME_NETWORK, difference, smooth_model
from tests.models import ALL, COVER, FLOWS, OPTIONS, SYMMETRIES, over, tiny_config, tiny_model, tokens
from tests.symmetry.test_counting import inputs, measure, small_model
from tests.tolerances import JACOBIAN_GAP, PAIRING, SYMMETRY, TRAINING


# How far a fitted order may be from the solver's.
ORDER = 0.15
ORDERS = {"euler": (1, (16, 32)), "midpoint": (2, (8, 16)), "rk4": (4, (8, 16))}
INTERPOLATIONS = ("constant", "linear")
INTERPOLATED = {"depth_solver": "midpoint", "depth_interpolation": "linear"}
LAYERED, ORDINARY = ([n for n, options in sets.items() if "depth_solver" not in options] for sets in (COVER, OPTIONS))
# Those whose layers can be interpolated.
JOINED = [name for name, options in COVER.items() if not APART & options.keys()]
ALL_JOINED = [
    name for name, options in SYMMETRIES.items() if not APART & options.keys() and "depth_solver" not in options
]


@pytest.fixture(scope="module", params=INTERPOLATIONS)
def flow(request):
    """A smooth model, an interpolation, and where its flow ends."""
    model = smooth_model()
    return model, request.param, flow_end(model, tokens(1, 5), interpolation=request.param)


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.by_default(2)
def test_solvers_converge_at_their_orders(flow, solver):
    model, interpolation, end = flow
    order, steps = ORDERS[solver]
    records = refinement(model, tokens(1, 5), solver, steps, interpolation=interpolation, reference=end)
    fitted = fitted_order(records)
    print(f"{solver}, {interpolation}: {fitted:.2f}, errors {records[0].error:.1e} to {records[-1].error:.1e}")
    assert abs(fitted - order) <= ORDER
    assert records[-1].error > 1e-9, "nothing but rounding was seen"


def test_steps_across_layers_lose_the_order(flow):
    """The weights' jumps, or kinks, are then inside of steps."""
    model, interpolation, end = flow
    settings = {"interpolation": interpolation, "reference": end, "across_layers": True}
    records = refinement(model, tokens(1, 5), "rk4", (8, 16), **settings)
    fitted = fitted_order(records)
    print(f"rk4 across layers, {interpolation}: {fitted:.2f}")
    assert fitted < {"constant": 1.2, "linear": 2.3}[interpolation]


def test_kinks_of_the_activation_lose_the_order():
    """`relu` is not smooth, so no fine step helps Runge and Kutta to their order."""
    model = smooth_model()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    with torch.no_grad():
        end = trajectory(model, tokens(1, 5), solver="rk4", steps=60)[-1]
    fitted = fitted_order(refinement(model, tokens(1, 5), "rk4", (8, 16), reference=end))
    print(f"rk4 with relu: {fitted:.2f}")
    assert fitted < 3


@over(LAYERED, ORDINARY)
def test_euler_s_trajectory_is_the_network_s_hidden_states(turned, option):
    model = turned(option).model
    if model.config.local_frames:
        with pytest.raises(ValueError, match="`model` must have one frame for all layers"):
            layer_field(model, tokens(1, 5))
        return
    expected = model.model(tokens(2, 7), output_hidden_states=True).hidden_states
    states = trajectory(model, tokens(2, 7), solver="euler")
    assert states.shape == (4, 2, 7, 32)
    for state, hidden in zip(states[:-1], expected[:-1], strict=True):
        assert difference(state, hidden) <= SAME_NETWORK
    assert difference(model.model.norm(states[-1]), expected[-1]) <= SAME_NETWORK
    assert_different(trajectory(model, tokens(2, 7), solver="rk4")[1], expected[1])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_model_that_follows_the_flow_ends_where_the_trajectory_does(interpolation):
    model = smooth_model()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"depth_solver": "rk4", "depth_steps": 3, "depth_interpolation": interpolation}
    states = trajectory(model, tokens(2, 5), solver="rk4", steps=3, interpolation=interpolation, attention_mask=mask)
    follows = smooth_model(**options)
    expected = follows.model(tokens(2, 5), attention_mask=mask).last_hidden_state
    assert_same(follows.model.norm(states[-1]), expected)
    assert_different(model.model.norm(states[-1]), model.model(tokens(2, 5)).last_hidden_state)
    # Nor does it matter whether the model is asked that follows the flow itself.
    assert_same(trajectory(follows, tokens(2, 5), solver="rk4", steps=3, attention_mask=mask)[-1], states[-1])


@pytest.mark.by_default(1)
def test_times_in_between_are_points_of_the_same_path(flow):
    model, interpolation, _ = flow
    settings = {"solver": "dopri5", "interpolation": interpolation}
    few, many = (trajectory(model, tokens(1, 5), times, **settings) for times in ([0.5, 3.0], [0.25, 0.5, 1.7, 3.0]))
    for state, again in zip(few, many[[1, 3]], strict=True):
        assert difference(again, state) < 1e-6
    field, start = layer_field(model, tokens(1, 5), interpolation=interpolation)
    times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    direct = odeint(field, start, times, rtol=1e-10, atol=1e-12)[-1]
    assert difference(direct, few[0]) < 1e-6
    assert_different(start, few[0])


def test_the_field_jumps_or_has_kinks_at_the_layers():
    model = smooth_model()
    before, at, after = (torch.tensor(t, dtype=torch.float64) for t in (1 - 1e-9, 1.0, 1 + 1e-9))
    constant, x = layer_field(model, tokens(1, 5))
    assert_different(constant(before, x), constant(at, x))
    assert torch.equal(constant(at, x), constant(after, x)) and torch.equal(constant.inside(1)(at, x), constant(at, x))
    linear, _ = layer_field(model, tokens(1, 5), interpolation="linear")
    assert difference(linear(before, x), linear(at, x)) < 1e-7 and torch.equal(linear(at, x), constant(at, x))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    slopes = []
    for t in (before, after):
        t.requires_grad_(True)
        slopes.append(torch.autograd.grad((linear(t, x.detach()) * weights).sum(), t)[0])
    assert_different(*slopes)
    step = torch.tensor(1e-5, dtype=torch.float64)
    change = ((linear(after + step, x) - linear(after, x)) * weights).sum() / step
    assert difference(change, slopes[1]) < 1e-4
    outside = [torch.tensor(t, dtype=torch.float64) for t in (-0.5, 2.0, 3.5)]
    assert torch.equal(linear(outside[0], x), linear(0 * at, x))
    assert torch.equal(linear(outside[1], x), linear(outside[2], x))


def test_the_field_has_gradients_by_inputs_and_weights():
    model = smooth_model()
    trajectory(model, tokens(1, 5), solver="midpoint", interpolation="linear")[-1].square().sum().backward()
    unseen = ("lm_head", "k_proj.bias")
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if n not in unseen)


def test_what_is_no_field_is_refused():
    model = smooth_model()
    with pytest.raises(ValueError, match="`interpolation` must be one of constant, linear, got 'cubic'"):
        layer_field(model, tokens(1, 5), interpolation="cubic")
    with pytest.raises(ValueError, match="`interpolation` must be 'constant' for layers with different parameters"):
        layer_field(tiny_model(value_embedding_period=2), tokens(1, 5), interpolation="linear")
    with pytest.raises(ValueError, match="`model` must not drop anything.* Call `model.eval"):
        layer_field(tiny_model(residual_dropout=0.1).train(), tokens(1, 5))
    with pytest.raises(ValueError, match="`solver` must be one of euler, .*, got 'dopri5'"):
        refinement(model, tokens(1, 5), "dopri5", (1, 2))
    for times in ([0.0, 4.0], [1.0, 1.0], [-1.0, 2.0], []):
        with pytest.raises(
            ValueError, match="`times` must increase from 0 or later to at most 3, the layers there are"
        ):
            trajectory(model, tokens(1, 5), times)


@over(JOINED, ALL_JOINED)
def test_interpolated_layers_share_their_frames(option):
    """Every element of the table, also composed, leaves the flow alone."""
    model = tiny_model(**ALL[option] | INTERPOLATED)
    first, second = (
        GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed), "all") for seed in (0, 1)
    )
    assert not any(
        key.startswith("layers.") for key in first.elements if not key.endswith(("key_shift", "residual_shift"))
    )
    for g in (first, second.inverse() @ first):
        error = gauge_error(model, g, tokens(2, 9))
        print(f"{error:.1e}")
        assert error <= SYMMETRY[torch.float64]


def test_frames_of_their_own_would_change_interpolated_layers():
    """And do not change constant ones."""
    constant = tiny_model(**SYMMETRIES["learned"] | {"depth_solver": "midpoint", "depth_interpolation": "constant"})
    for frame in ("head_qk", "head_vo", "heads", "neurons", "value_shift"):
        g = GaugeTransformation.random(constant.config, torch.Generator().manual_seed(0), frame)
        assert len(g.elements) == 3
        pair = constant, g(constant)
        assert_same(*(model(tokens(2, 9)).logits for model in reversed(pair)))
        between = [copy.deepcopy(model) for model in pair]
        for model in between:
            model.config.depth_interpolation = "linear"
        assert_different(*(model(tokens(2, 9)).logits for model in between))


def test_the_flow_turns_along_with_the_stream():
    model = tiny_model(**SYMMETRIES["learned"] | INTERPOLATED)
    rotation = haar(32, torch.Generator().manual_seed(1))
    turned = GaugeTransformation(model.config, {"stream": rotation[None]})(model)
    before, after = (trajectory(each, tokens(2, 7), [0.5, 1.7], solver="rk4") for each in (model, turned))
    assert_same(after, before @ rotation.T)
    assert_different(after, before)


# Few steps, and far from the flow, so that what chooses them is seen.
LOOSE = {"depth_rtol": 1e-3, "depth_atol": 1e-4}


def coordinate_by_coordinate(monkeypatch) -> None:
    """Let torchdiffeq choose steps as it does by itself, which depends on the basis."""
    flow_rigpt.torchdiffeq()
    for name in ("odeint", "odeint_adjoint"):
        solver = flow_rigpt.SOLVERS[name]

        def theirs(*arguments, rtol=None, atol=None, adjoint_params=None, solver=solver, **settings):
            if rtol is not None:
                settings |= {"rtol": LOOSE["depth_rtol"], "atol": LOOSE["depth_atol"]}
            for setting in ("adjoint_rtol", "adjoint_atol", "adjoint_options"):
                settings.pop(setting, None)
            return solver(*arguments, **settings | ({"adjoint_params": adjoint_params} if adjoint_params else {}))

        monkeypatch.setitem(flow_rigpt.SOLVERS, name, theirs)


def turned_error(options: dict) -> float:
    """What a random element of all compact frames changes of the logits."""
    model = smooth_model(**LOOSE | options)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(3), "all", compact=True)
    with torch.no_grad():
        return difference(g(model)(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


@over(["steps", "linear", "dopri5", "linear-dopri5", "adjoint-linear-bosh3"], FLOWS)
def test_no_solver_has_a_preferred_basis(option):
    error = turned_error(FLOWS[option])
    print(f"{error:.1e}")
    assert error <= SYMMETRY[torch.float64]


@over(["linear-dopri5"], ["dopri5"])
def test_tolerances_of_each_coordinate_would_have_one(option, monkeypatch):
    coordinate_by_coordinate(monkeypatch)
    assert turned_error(FLOWS[option]) > 100 * SYMMETRY[torch.float64]


def trained_apart(options: dict) -> float:
    """The distance after two steps between the turned training and the training turned, relative to the way."""
    model = smooth_model(**LOOSE | options)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(3), "all", compact=True)
    turned, start = g(model), g(model)
    for each in (model, turned):
        optimizer = EquivariantOptimizer(equivariant_param_groups(each, lr=1e-2))
        for seed in range(2):
            optimizer.zero_grad()
            each(tokens(1, 5, seed=seed), labels=tokens(1, 5, seed=seed), use_cache=False).loss.backward()
            optimizer.step()
    gap, way = (
        sum(
            float((p - q).detach().square().sum())
            for p, q in zip(g(model).parameters(), other.parameters(), strict=True)
        )
        for other in (turned, start)
    )
    assert way > 1e-2, "nothing was learned"
    return (gap / way) ** 0.5


@over(["linear", "linear-dopri5", "adjoint-dopri5"], ["steps", "adjoint", "dopri5"])
@pytest.mark.by_default(1)
def test_training_through_every_solver_turns_along(option):
    distance = trained_apart(FLOWS[option])
    print(f"{distance:.1e}")
    assert distance <= TRAINING


@over(["adjoint-dopri5"], ["dopri5"])
def test_tolerances_of_each_coordinate_would_turn_training_off_its_way(option, monkeypatch):
    coordinate_by_coordinate(monkeypatch)
    assert trained_apart(FLOWS[option]) > 100 * TRAINING


def test_steps_back_do_not_depend_on_the_scale_of_the_loss(monkeypatch):
    def gradient(scale: float) -> torch.Tensor:
        model = smooth_model(**LOOSE | FLOWS["adjoint-dopri5"])
        (scale * model(tokens(1, 5), labels=tokens(1, 5)).loss).backward()
        return model.model.embed_tokens.weight.grad / scale

    assert_same(gradient(2**-20), gradient(1.0))
    coordinate_by_coordinate(monkeypatch)
    assert difference(gradient(2**-20), gradient(1.0)) > 100 * SYMMETRY[torch.float64]


def test_shared_frames_are_counted_once():
    """As many redundant directions as the Jacobian shows, for two layers."""
    options = {"num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 3}
    model = small_model("no-biases", **options | INTERPOLATED | {"hidden_act": "relu2", "depth_steps": 1})
    counted = redundant_dimensions(model.config)
    own = redundant_dimensions(small_model("no-biases", **options).config)
    assert 2 * counted["head_vo"] == own["head_vo"]
    spectrum = measure(model, inputs(24))
    assert spectrum.gap > JACOBIAN_GAP and spectrum.deficiency == counted["total"]


def test_gradients_pair_to_zero_with_shared_frames():
    model = tiny_model(**SYMMETRIES["no-biases"] | INTERPOLATED)
    loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
    pairings = gradient_pairing(model, loss)
    assert {"stream", "head_vo", "head_qk"} <= set(pairings)
    assert all(pairing.relative < PAIRING for pairing in pairings.values())


def test_what_has_not_been_worked_out_for_shared_frames_is_refused():
    model = tiny_model(**SYMMETRIES["learned"] | INTERPOLATED)
    for act in (canonicalize, lambda model: gauge_distance(model, model)):
        with pytest.raises(
            ValueError, match="Balancing.* needs layers with frames of their own, got `depth_interpola"
        ):
            act(model)
    loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
    with pytest.raises(
        ValueError, match="The pairing with translations of heads needs layers with frames of their own"
    ):
        gradient_pairing(model, loss)
    assert table_of(tiny_config()).frames.keys() != table_of(model.config).frames.keys()


def test_local_frames_follow_the_same_flow():
    """The stream is carried into a layer's frame before it flows there."""
    model = tiny_model(depth_solver="rk4", depth_steps=2)
    rotations = torch.stack([haar(32, torch.Generator().manual_seed(seed)) for seed in range(3)])
    local = to_local_frames(model, rotations)
    assert local.config.local_frames and local.config.depth_solver == "rk4"
    assert_same(local(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    with pytest.raises(ValueError, match="`depth_interpolation='linear'` adds weights of neighbouring layers"):
        to_local_frames(tiny_model(**INTERPOLATED), rotations)


@pytest.mark.full
def test_the_figure_shows_the_flow_and_the_orders(monkeypatch):
    fewer = {solver: (*style, steps[1:3]) for solver, (*style, steps) in pictures.SOLVERS.items()}
    monkeypatch.setattr(pictures, "SOLVERS", fewer)
    figure = pictures.plot_depth(seed=1)
    left, right = figure.axes
    assert left.get_xlabel() and right.get_xlabel() and figure.get_suptitle()
    slopes = {}
    for line in right.get_lines():
        step, error = (torch.tensor(values, dtype=torch.float64).log() for values in line.get_data())
        slopes[line.get_label()] = float((error[-1] - error[-2]) / (step[-1] - step[-2]))
    assert abs(slopes["rk4, layer by layer"] - 4) < 0.3 and slopes["rk4, across layers"] < 1.5
    assert len(encoded(figure)) > 20_000
