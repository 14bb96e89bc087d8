"""Experts: the network with a router, and what its options mean."""

import copy

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTConfig
from rigpt_hf.frames import table_of
from rigpt_hf.mlp_rigpt import RiGPTExperts, RiGPTMLP, RiGPTRouter, RiGPTSparseMLP
from rigpt_hf.neurons_rigpt import bounds_of
from rigpt_hf.optimizer.groups import Update, update_of
from rigpt_hf.symmetry import GaugeTransformation, redundant_dimensions
from tests.model.agreement import assert_different, assert_same, assert_same_gradients, recompute_activations
from tests.models import CLAMPED, EXPERTS, SHARED_EXPERT, tiny_config, tiny_model, tokens


KINDS = {
    "experts": EXPERTS,
    "shared": SHARED_EXPERT,
    "clamped": EXPERTS | CLAMPED | {"norm_topk_prob": True},
    "unbiased": EXPERTS | {"mlp_bias": False},
}
over_kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_topk_prob": True}, "`norm_topk_prob` needs `num_experts`, got True without"),
        ({"mlp_only_layers": [0]}, "`mlp_only_layers` needs `num_experts`"),
        ({"num_experts": 0}, "`num_experts` must be at least 1, got 0"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "`num_experts_per_tok` must be at most `num_experts=2`, got 3"),
        ({"num_experts": 2, "shared_expert_intermediate_size": 0}, "`shared_expert_intermediate_size` must be at le"),
        ({"swiglu_alpha": 1.7}, "`swiglu_alpha` needs `swiglu_limit`, got 1.7 without"),
        ({"swiglu_limit": 7.0}, "`swiglu_limit=7.0` bounds gates .* needs `gated_mlp=True`, got False"),
        ({"swiglu_limit": 0.0, "gated_mlp": True}, "`swiglu_limit` must be positive and finite, got 0.0"),
        ({"swiglu_limit": 7.0, "swiglu_alpha": -1.0}, "`swiglu_alpha` must be positive and finite, got -1.0"),
        ({"num_experts": 2, "depth_solver": "euler"}, "`depth_solver='euler'` needs layers that are smooth"),
        ({"num_experts": 2, "mlp_only_layers": [3], "num_hidden_layers": 3}, "numbers of layers from 0 to 2, got 3"),
    ],
)
def test_refusals_name_the_field_and_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        RiGPTConfig(**options)


def test_neurons_of_an_expert_are_those_of_the_mlp_unless_said():
    assert RiGPTConfig(num_experts=2, intermediate_size=24).moe_intermediate_size == 24
    assert RiGPTConfig(intermediate_size=24).moe_intermediate_size is None


def by_hand(mlp: RiGPTSparseMLP, x: torch.Tensor, normalised: bool) -> torch.Tensor:
    """The formula at the head of `mlp_rigpt.py` for one token `[d]`."""
    logits = mlp.gate.weight @ x + (0.0 if mlp.gate.bias is None else mlp.gate.bias)
    probabilities = logits.softmax(dim=0)
    chosen = probabilities.argsort(descending=True)[:2]
    total = probabilities[chosen].sum() if normalised else 1.0
    size, maps = 12, mlp.experts
    result = torch.zeros_like(x)
    for expert in chosen.tolist():
        rows = range(expert * size, (expert + 1) * size)
        gate, up = (
            module.weight[rows] @ x + (0.0 if module.bias is None else module.bias[rows])
            for module in (maps.gate_proj, maps.up_proj)
        )
        if maps.bounds is None:
            neurons = nn.functional.silu(gate) * up
        else:
            limit, alpha = maps.bounds
            bound = torch.tensor(limit, dtype=torch.float64)
            gate, up = gate.minimum(bound), up.maximum(-bound).minimum(bound)
            neurons = gate * torch.sigmoid(alpha * gate) * (up + 1)
        bias = 0.0 if maps.down_bias is None else maps.down_bias[:, expert]
        result += probabilities[expert] / total * (maps.down_proj.weight[:, rows] @ neurons + bias)
    if normalised:  # as gpt-oss has it: the softmax over the logits of those that are chosen
        assert_same(logits[chosen].softmax(dim=0), probabilities[chosen] / total)
    if mlp.shared_expert is not None:
        gate = mlp.shared_expert_gate
        share = torch.sigmoid(gate.weight @ x + (0.0 if gate.bias is None else gate.bias))
        result += share * mlp.shared_expert(x)
    return result


@over_kinds
@torch.no_grad()
def test_the_formula(options):
    model = tiny_model(**options)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 25, 32, dtype=torch.float64)
    _, _, indices = mlp.gate(x.reshape(-1, 32))
    assert set(indices.flatten().tolist()) == set(range(4)), "an expert is not looked at"
    output = mlp(x)
    for normalised in (True, False):
        expected = torch.stack([by_hand(mlp, token, normalised) for token in x.reshape(-1, 32)]).view_as(x)
        check = assert_same if normalised is options.get("norm_topk_prob", False) else assert_different
        check(output, expected)


@torch.no_grad()
def test_every_bias_and_bound_does_something():
    model, ids = tiny_model(**KINDS["clamped"]), tokens(2, 25)
    expected = model(ids).logits
    names = ("gate.bias", "experts.gate_proj.bias", "experts.up_proj.bias", "experts.down_bias")
    for name in names:
        parameter = model.get_parameter(f"model.layers.1.mlp.{name}")
        before = parameter.clone()
        parameter.mul_(1.5).add_(torch.linspace(0, 0.3, parameter.shape[-1]))
        assert_different(model(ids).logits, expected)
        parameter.copy_(before)
    maps = [module for module in model.modules() if isinstance(module, RiGPTMLP)]
    limit, alpha = before = bounds_of(model.config)
    for changed in ((limit + 0.1, alpha), (limit, 1.0)):
        for module in maps:
            module.bounds = changed
        assert_different(model(ids).logits, expected)
    for module in maps:
        module.bounds = before
    assert_same(model(ids).logits, expected)


@torch.no_grad()
def test_neurons_within_bounds_change_places_and_no_lengths():
    """A factor that another neuron takes back is one that a bound sees."""
    model, ids = tiny_model(**CLAMPED, hidden_act="silu"), tokens(2, 25)
    assert redundant_dimensions(model.config)["neurons"] == 0
    assert redundant_dimensions(tiny_config(gated_mlp=True, hidden_act="silu"))["neurons"] == 3 * 128
    free = tiny_model(gated_mlp=True, hidden_act="silu")
    for each, check in ((free, assert_same), (model, assert_different)):
        before, mlp = each(ids).logits, each.model.layers[1].mlp
        for factor, tensor in ((2, mlp.up_proj.weight), (2, mlp.up_proj.bias), (0.5, mlp.down_proj.weight)):
            tensor *= factor
        check(each(ids).logits, before)


def test_layers_without_experts_are_those_that_are_named():
    mlps = [layer.mlp for layer in tiny_model(**SHARED_EXPERT).model.layers]
    assert [type(mlp) for mlp in mlps] == [RiGPTSparseMLP, RiGPTMLP, RiGPTSparseMLP]
    assert mlps[1].up_proj.out_features == tiny_config().intermediate_size
    assert not any(isinstance(module, RiGPTRouter) for module in tiny_model().modules())


@over_kinds
def test_what_others_put_in_the_place_of_a_map_is_called(options):
    """A hook, an adapter, or the compiler: by way of all experts, with the same result and the same gradients."""
    model, called = tiny_model(**options), []
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, RiGPTExperts):
            module.up_proj.register_forward_hook(lambda *args: called.append(1))
    losses = [each(tokens(2, 19), labels=tokens(2, 19)).loss for each in (model, other)]
    assert_same(*losses)
    assert len(called) == (2 if options is SHARED_EXPERT else 3)
    for loss in losses:
        loss.backward()
    assert_same_gradients(other, model)


@pytest.mark.full
def test_one_graph_for_all_routes():
    model = tiny_model(**SHARED_EXPERT)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same(compiled(tokens(2, 9), use_cache=False).logits, model(tokens(2, 9), use_cache=False).logits)


@torch.no_grad()
def test_experts_change_places_along_with_the_rows_of_their_router():
    model = tiny_model(**EXPERTS)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(4), ["experts"])
    turned = g(model)
    assert_same(turned(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    for name in ("gate.weight", "gate.bias", "experts.down_bias"):
        left = copy.deepcopy(turned)
        for layer, before in zip(left.model.layers, model.model.layers, strict=True):
            parameter = layer.mlp.get_parameter(name)
            assert not torch.equal(parameter, before.mlp.get_parameter(name))
            parameter.copy_(before.mlp.get_parameter(name))
        assert_different(left(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_one_vector_for_all_rows_of_a_router_and_not_for_some():
    model = tiny_model(**EXPERTS)
    before = model(tokens(2, 9)).logits
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight += torch.linspace(-2, 2, 32, dtype=torch.float64)
        assert_same(model(tokens(2, 9)).logits, before)
        model.model.layers[1].mlp.gate.weight[0] += torch.linspace(-2, 2, 32, dtype=torch.float64)
        assert_different(model(tokens(2, 9)).logits, before)


def test_one_number_for_all_biases_of_a_router_and_not_for_some():
    model = tiny_model(**EXPERTS)
    before = model(tokens(2, 9)).logits
    with torch.no_grad():
        model.model.layers[1].mlp.gate.bias += 0.7
        assert_same(model(tokens(2, 9)).logits, before)
        model.model.layers[1].mlp.gate.bias[0] += 0.7
        assert_different(model(tokens(2, 9)).logits, before)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_constant_of_all_experts_may_be_that_of_attention(normalised):
    """If their weights sum to 1; otherwise it is a constant no more."""
    model = tiny_model(**EXPERTS | {"norm_topk_prob": normalised}, use_parallel_residual=True)
    assert ("residual_shift" in redundant_dimensions(model.config)) is normalised
    before, layer = model(tokens(2, 9)).logits, model.model.layers[1]
    with torch.no_grad():
        constant = torch.linspace(-2, 2, 32, dtype=torch.float64)
        layer.mlp.experts.down_bias += constant[:, None]
        layer.self_attn.o_proj.bias -= constant
    (assert_same if normalised else assert_different)(model(tokens(2, 9)).logits, before)


def test_the_matrix_of_every_expert_is_updated_by_itself():
    table, mlp = table_of(tiny_config(**SHARED_EXPERT)), "model.layers.2.mlp."
    assert update_of(table, f"{mlp}experts.gate_proj.weight") == Update("polar", 4, 0)
    assert update_of(table, f"{mlp}experts.up_proj.weight") == Update("polar", 4, 0)
    assert update_of(table, f"{mlp}experts.down_proj.weight") == Update("polar", 4, 1)
    assert update_of(table, f"{mlp}gate.weight") == Update("polar", 1, 0)
    assert update_of(table, f"{mlp}shared_expert.down_proj.weight") == Update("polar", 1, 0)
    assert update_of(table, f"{mlp}experts.down_bias") == Update("polar", 1, 0)
    assert update_of(table, f"{mlp}experts.up_proj.bias") == Update("vectors", 4, 0)
    assert update_of(table, f"{mlp}gate.bias") == Update("coordinatewise", 1, 0)
    assert update_of(table, "model.layers.1.mlp.up_proj.weight") == Update("polar", 1, 0)


def test_logits_of_routers_and_the_loss_that_spreads_tokens():
    model, ids = tiny_model(**SHARED_EXPERT, router_aux_loss_coef=0.001), tokens(2, 9)
    plain = model(ids, labels=ids)
    assert plain.router_logits is None and plain.aux_loss is None
    output = model(ids, labels=ids, output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(18, 4), (18, 4)]
    assert_same(output.loss, plain.loss + 0.001 * output.aux_loss)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    assert_same(model(ids, labels=ids).loss, plain.loss + 0.5 * output.aux_loss)
    with torch.no_grad():
        for layer in model.model.layers:
            if isinstance(layer.mlp, RiGPTSparseMLP):
                layer.mlp.gate.weight.zero_()
                layer.mlp.gate.bias.zero_()
    # All are equally likely, and ties go to the same two: half of the experts have all tokens.
    assert float(model(ids).aux_loss) == pytest.approx(2.0)
    assert_different(output.aux_loss, model(ids).aux_loss)


def test_checkpointing_gives_the_same_gradients():
    model, ids = tiny_model(**SHARED_EXPERT).train(), tokens(2, 9)
    other = copy.deepcopy(model)
    recompute_activations(other)
    for each in (model, other):
        each(ids, labels=ids).loss.backward()
    assert_same_gradients(other, model)
