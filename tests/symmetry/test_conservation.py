"""Noether's theorem for weights: what the gradient pairs to zero with, what descent conserves, what decay forgets."""

import copy
import math

import pytest
import torch

from rigpt_hf.checkpoints.written import WRITTEN
from rigpt_hf.pictures import save
from rigpt_hf.pictures.symmetry import plot_drift
from rigpt_hf.symmetry import FrameKey, charges, gradient_pairing, table_of
from rigpt_hf.symmetry.contraction import views, weights_of
from rigpt_hf.symmetry.drift import charge_drift
from tests.models import SYMMETRIES, over, tiny_model, tokens
from tests.symmetry.options import BROAD
from tests.tolerances import ORDER, PAIRING


# Every kind of charge, and the frames that have one.
CHARGED = {
    "multi-head": {"head_qk", "head_vo"},
    "learned": {"head_qk", "head_vo", "key_shift"},
    "learned-untied-projected": {"head_qk", "head_vo", "key_shift", "lexical", "output"},
    "learned-projected": {"head_qk", "head_vo", "key_shift", "lexical"},
    "learned-untied": {"head_qk", "head_vo", "key_shift", "position_shift"},
    "rotary-partial": {"head_qk", "head_vo", "key_shift"},
    "parallel": {"head_qk", "head_vo", "residual_shift"},
    "parallel-mlp-bias": {"head_qk", "head_vo"},
    "squared-distance": {"head_qk", "head_vo"},
    "squared-distance-partial": {"head_qk", "head_vo"},
    "qk-norm": {"head_vo"},
    "relu2": {"head_qk", "head_vo", "neurons"},
    "gated": {"head_qk", "head_vo", "neurons"},
    "gated-relu2": {"head_qk", "head_vo", "neurons"},
}
# Charges that are sums of weights: no gradient reaches them.
LINEAR = {"key_shift", "residual_shift", "position_shift"}
LEARNING_RATES, TIME, DECAY = (0.02, 0.01), 0.4, 0.5
# Together they have every kind of charge.
charged = over(["learned-untied-projected", "learned-untied", "squared-distance", "gated-relu2", "parallel"], CHARGED)
decays = pytest.mark.parametrize("decay", [0.0, DECAY], ids=["plain", "decay"])


def charged_model(name: str):
    return tiny_model(num_hidden_layers=1, **SYMMETRIES[name])


def batch() -> torch.Tensor:
    return tokens(4, 12)


def loss_of(model) -> torch.Tensor:
    return model(batch(), labels=batch(), use_cache=False).loss


def gradient_of(model) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model), parameters), strict=True))


def size(tensors) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


@over(BROAD, SYMMETRIES)
@pytest.mark.by_default(12)
def test_the_gradient_pairs_to_zero_with_every_generator(option):
    # With a gradient for what is frozen by its nature, too: it moves along with a symmetry.
    model = tiny_model(**SYMMETRIES[option]).requires_grad_(True)
    pairings = gradient_pairing(model, loss_of(model))
    table = table_of(model.config)
    assert set(pairings) == {str(key) for key, frame in table.frames.items() if frame.group.dimension}
    assert {FrameKey.parse(key).kind for key in pairings} >= {"stream", "head_vo"}
    for key, pairing in pairings.items():
        assert pairing.relative <= PAIRING, key
    stream = pairings["stream"].value[0]
    assert stream.shape == (32, 32) and torch.equal(stream, -stream.T)
    # The terms that cancel are not small one by one.
    gradient, weights = gradient_of(model), weights_of(model)
    assert size(gradient.values()) > 0.01
    for view in views(table, gradient, weights, [key for key in table.frames if str(key) in pairings]):
        terms = [size([value]) for role, value in view.grams.items() if role not in ("metric", "planes")]
        # The map of a norm alone turns with its frame: there the two halves of one term cancel.
        alone = view.key.kind in ("query_norm", "key_norm")
        assert len(terms) >= 2 - alone and min(terms) > 1e-6, view.key


def test_any_loss_of_the_logits_will_do():
    model = tiny_model(**SYMMETRIES["learned-untied-projected"])
    pairings = gradient_pairing(model, lambda model: model(batch(), use_cache=False).logits.pow(3).mean())
    assert len(pairings) >= 10
    assert max(pairing.relative for pairing in pairings.values()) <= PAIRING


def test_a_loss_that_sees_hidden_coordinates_does_not_pair_with_the_stream():
    model = tiny_model(**SYMMETRIES["learned-projected"])
    pairings = gradient_pairing(model, model(batch(), output_hidden_states=True).hidden_states[-1][..., 0].mean())
    assert pairings.pop("stream").relative > 1e-3
    assert max(pairing.relative for pairing in pairings.values()) <= PAIRING, "the other frames see nothing of it"


@charged
def test_weight_decay_pairs_with_stretches_and_not_with_rotations(option):
    model = charged_model(option)
    decay = sum(parameter.square().sum() for parameter in model.parameters()) / 2
    pairings, conserved = gradient_pairing(model, loss_of(model) + decay), charges(model)
    assert pairings["stream"].relative <= PAIRING
    assert conserved
    for key, charge in conserved.items():
        # The gradient of |θ|²/2 is θ, and its pairing with the generators is what the charge is.
        assert pairings[key].relative > 1e-5, key
        assert (pairings[key].value - charge).abs().max() <= PAIRING * size(weights_of(model).values()) ** 2, key


def test_a_loss_that_is_no_scalar_or_has_no_gradients_is_named():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`loss` must be a scalar .* got shape \(4, 12, 61\) and requires_grad=True"):
        gradient_pairing(model, model(batch()).logits)
    loss = loss_of(model).detach()
    with pytest.raises(ValueError, match=r"`loss` must be a scalar .* got shape \(\) and requires_grad=False"):
        gradient_pairing(model, loss)


def test_the_frames_that_have_charges():
    for option, kinds in CHARGED.items():
        assert {FrameKey.parse(key).kind for key in charges(charged_model(option))} == kinds, option


def test_the_charges_of_a_general_model_by_hand():
    model = charged_model("learned-untied-projected")
    values, weights = charges(model), weights_of(model)
    attention = "model.layers.0.self_attn."
    q, k, v = (
        torch.cat([weights[f"{attention}{x}_proj.weight"], weights[f"{attention}{x}_proj.bias"][:, None]], dim=1)
        for x in "qkv"
    )
    o = weights[attention + "o_proj.weight"]
    for head, (first, second) in enumerate(((0, 1), (2, 3))):  # query heads that share the key-value head
        keys = slice(8 * head, 8 * head + 8)
        queries = [slice(8 * index, 8 * index + 8) for index in (first, second)]
        expected = sum(q[rows] @ q[rows].T for rows in queries) - k[keys] @ k[keys].T
        assert (values["layers.0.head_qk"][head] - expected).abs().max() <= PAIRING * expected.abs().max()
        expected = v[keys] @ v[keys].T - sum(o[:, rows].T @ o[:, rows] for rows in queries)
        assert (values["layers.0.head_vo"][head] - expected).abs().max() <= PAIRING * expected.abs().max()
        assert torch.equal(values["layers.0.key_shift"][head], k[keys, -1])
    embed, into = weights["model.embed_tokens.weight"], weights["model.project_in.weight"]
    out, bias, head = (
        weights[name] for name in ("model.project_out.weight", "model.project_out.bias", "lm_head.weight")
    )
    expected = embed.T @ embed - into.T @ into
    assert (values["lexical"][0] - expected).abs().max() <= PAIRING * expected.abs().max()
    expected = out @ out.T + torch.outer(bias, bias) - head.T @ head
    assert (values["output"][0] - expected).abs().max() <= PAIRING * expected.abs().max()


def test_the_charges_of_lengths_and_neurons_by_hand():
    model = charged_model("squared-distance")
    weights, total = weights_of(model), 0.0
    for name, sign in (("q_proj.weight", 1), ("q_proj.bias", 1), ("k_proj.weight", -1), ("k_proj.bias", -1)):
        total = total + sign * weights[f"model.layers.0.self_attn.{name}"].reshape(2, -1).square().sum(1)
    metric = weights["model.layers.0.self_attn.distance_weight"].reshape(2, -1).square().sum(1)
    traces = charges(model)["layers.0.head_qk"].diagonal(dim1=-2, dim2=-1).sum(-1)
    assert metric.min() > 1e-3
    assert (traces - (total + 2 * metric)).abs().max() <= PAIRING * total.abs().max()

    model = charged_model("gated-relu2")
    mlp = {name.split("mlp.")[1]: weight for name, weight in weights_of(model).items() if ".mlp." in name}
    active, linear = (
        mlp[f"{name}_proj.weight"].square().sum(1) + mlp[f"{name}_proj.bias"].square() for name in ("gate", "up")
    )
    down = mlp["down_proj.weight"].square().sum(0)
    values = charges(model)["layers.0.neurons"][0]
    assert (values - torch.stack([active - 2 * down, linear - down])).abs().max() <= PAIRING * active.max()


@charged
@decays
def test_one_step_changes_charges_by_their_form_on_the_gradient(option, decay):
    model, rate = charged_model(option), 1.0
    before, gradient = charges(model), gradient_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 - rate * decay).sub_(gradient[name], alpha=rate)
    after, table = charges(model), table_of(model.config)
    views_of = {str(view.key): view for view in views(table, gradient, gradient)}
    moved = 0
    for key in before:
        if FrameKey.parse(key) in table.shifts:
            expected = (1 - rate * decay) * before[key]
        else:
            form = views_of[key].group.generator(views_of[key].grams)
            expected = (1 - rate * decay) ** 2 * before[key] + rate**2 * form
            moved += form.abs().max() > 1e-6
        assert (after[key] - expected).abs().max() <= PAIRING * expected.abs().max(), key
    assert moved >= 1


@charged
@pytest.mark.by_default(2)
def test_the_drift_of_charges_under_gradient_descent_is_of_first_order(option):
    report = charge_drift(charged_model(option), batch(), learning_rates=LEARNING_RATES, time=TIME, progress=False)
    assert set(report.orders) == CHARGED[option]
    for kind, order in report.orders.items():
        coarse, fine = (max(descent.drift[kind]) for descent in report.descents)
        if kind in LINEAR:
            assert coarse <= PAIRING and math.isnan(order)
            continue
        assert abs(order - 1) <= ORDER, kind
        assert abs(coarse / fine - 2) <= 2 * ORDER, kind
        assert fine > 1e3 * PAIRING, "nothing drifted"
    for descent in report.descents:
        assert descent.losses[-1] < 0.9 * descent.losses[0], "nothing was learned"


@charged
@pytest.mark.by_default(2)
def test_weight_decay_forgets_charges_at_the_predicted_rate(option):
    settings = {"learning_rates": LEARNING_RATES, "time": TIME, "weight_decay": DECAY, "progress": False}
    report = charge_drift(charged_model(option), batch(), **settings)
    assert set(report.predicted_rates) == CHARGED[option]
    for kind, rate in report.predicted_rates.items():
        assert rate == (DECAY if kind in LINEAR else 2 * DECAY)
        coarse, fine = (abs(descent.kept[kind][-1] - math.exp(-rate * TIME)) for descent in report.descents)
        assert abs(coarse / fine - 2) <= 2 * ORDER, kind
        assert abs(report.measured_rates[kind] / rate - 1) <= ORDER * ORDER, kind
        if kind not in LINEAR:
            assert abs(report.orders[kind] - 1) <= ORDER, kind


def descend(model, optimizer_class, rate: float, time: float) -> tuple[float, ...]:
    """How far the charges of values drift, and the Gram matrix of values alone."""
    model = copy.deepcopy(model)
    optimizer = optimizer_class(model.parameters(), lr=rate)

    def observed() -> tuple[torch.Tensor, torch.Tensor]:
        values = weights_of(model)["model.layers.0.self_attn.v_proj.weight"]
        return charges(model)["layers.0.head_vo"], values @ values.T

    start = observed()
    for _ in range(round(time / rate)):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return tuple(size([now - then]) / size([then]) for now, then in zip(observed(), start, strict=True))


def test_what_is_no_charge_moves():
    model = charged_model("learned")
    moves = [descend(model, torch.optim.SGD, rate, TIME) for rate in (0.02, 0.005)]
    charge, gram = zip(*moves, strict=True)
    assert abs(charge[0] / charge[1] - 4) <= 4 * ORDER
    assert abs(gram[0] / gram[1] - 1) <= ORDER, "the Gram matrix moves by the same at every step size"
    assert gram[1] > 100 * charge[1]


def test_adam_does_not_conserve():
    model = charged_model("learned")
    # Adam moves every weight by its learning rate in a step, which makes for a long way in a short time.
    coarse, fine = (descend(model, torch.optim.Adam, rate, TIME / 8)[0] for rate in (0.01, 0.00125))
    assert fine > 0.7 * coarse, "steps of an eighth of the size do not help"
    assert fine > 0.01


def test_drift_measures_what_descent_does():
    model = charged_model("learned")
    before = copy.deepcopy(model.state_dict())
    report = charge_drift(model, batch(), learning_rates=[0.1], time=0.2, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model changed"
    (descent,) = report.descents
    assert descent.times == [0.0, 0.1, 0.2]
    start = charges(model)["layers.0.head_vo"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for loss in descent.losses[:-1]:
        optimizer.zero_grad()
        current = loss_of(model)
        current.backward()
        optimizer.step()
        assert abs(current.item() - loss) <= PAIRING * loss
    end = charges(model)["layers.0.head_vo"]
    attention, now = "model.layers.0.self_attn.", before
    names = [attention + name for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight")]
    scale = size(now[name] for name in names) ** 2
    assert abs(descent.drift["head_vo"][-1] - size([end - start]) / scale) <= PAIRING
    assert descent.drift["head_vo"][-1] > 1e3 * PAIRING
    assert math.isnan(report.orders["head_vo"]), "one learning rate has no order"


def test_drift_of_a_model_in_single_precision():
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2, **SYMMETRIES["rotary-learned"])
    report = charge_drift(model, batch(), learning_rates=(0.04, 0.02), time=0.4, progress=False)
    assert abs(report.orders["head_vo"] - 1) <= ORDER
    assert next(model.parameters()).dtype == torch.float32


@decays
@pytest.mark.full
def test_the_picture_of_the_drift(decay, tmp_path):
    model = charged_model("learned")
    report = charge_drift(model, batch(), learning_rates=(0.2, 0.1), time=0.4, weight_decay=decay, progress=False)
    picture = save(plot_drift(report), tmp_path / "drift.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    drawn = save(plot_drift(report), tmp_path / "drift.svg").read_text()
    assert drawn.startswith("<?xml")
    assert {path.name for path in tmp_path.iterdir()} == {"drift.png", "drift.svg", WRITTEN}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": ()}, r"`learning_rates` must be one or more positive step sizes, got \[\]"),
        ({"learning_rates": (0.1, -0.1)}, r"`learning_rates` must be .* positive step sizes, got \[0.1, -0.1\]"),
        ({"time": 0.0}, "`time` must be positive and finite, got 0.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must not be negative, and finite, got -1.0"),
        ({"learning_rates": (float("nan"),)}, r"`learning_rates` must be .* got \[nan\]"),
        ({"time": float("inf")}, "`time` must be positive and finite, got inf"),
        ({"time": 1e9}, r"`time` must take at most 1,000,000 steps .* got 1e\+09"),
        ({"learning_rates": (1e-320,)}, "`time` must take at most 1,000,000 steps"),
        ({"weight_decay": float("nan")}, "`weight_decay` must not be negative, and finite, got nan"),
        ({"learning_rates": (0.3,), "time": 1.0}, "`time` must be a whole number of steps .* got 1.0 with .* 0.3"),
        (
            {"learning_rates": (100.0,), "time": 1e5, "weight_decay": 1.0},
            "`learning_rates` must be small enough to descend, got 100.0: after .* steps the loss is nan. Lower it.",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_impossible_descents_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        charge_drift(charged_model("learned"), batch(), progress=False, **settings)
