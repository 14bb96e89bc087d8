"""Experts: the network with a router, and what its options mean."""

import copy

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTConfig
from rigpt_hf.frames import table_of
from rigpt_hf.mlp_rigpt import RiGPTExperts, RiGPTMLP, RiGPTRouter, RiGPTSparseMLP
from rigpt_hf.optimizer.groups import Update, update_of
from rigpt_hf.symmetry import GaugeTransformation
from tests.model.agreement import assert_different, assert_same, assert_same_gradients, recompute_activations
from tests.models import EXPERTS, SHARED_EXPERT, tiny_config, tiny_model, tokens


over_kinds = pytest.mark.parametrize("options", [EXPERTS, SHARED_EXPERT], ids=["experts", "shared"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_topk_prob": True}, "`norm_topk_prob` needs `num_experts`, got True without"),
        ({"mlp_only_layers": [0]}, "`mlp_only_layers` needs `num_experts`"),
        ({"num_experts": 0}, "`num_experts` must be at least 1, got 0"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "`num_experts_per_tok` must be at most `num_experts=2`, got 3"),
        ({"num_experts": 2, "shared_expert_intermediate_size": 0}, "`shared_expert_intermediate_size` must be at le"),
        ({"num_experts": 2, "mlp_bias": True}, "`mlp_bias=True` has no place in experts"),
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
    probabilities = (mlp.gate.weight @ x).softmax(dim=0)
    chosen = probabilities.argsort(descending=True)[:2]
    total = probabilities[chosen].sum() if normalised else 1.0
    size, maps = 12, mlp.experts
    result = torch.zeros_like(x)
    for expert in chosen.tolist():
        rows = range(expert * size, (expert + 1) * size)
        neurons = nn.functional.silu(maps.gate_proj.weight[rows] @ x) * (maps.up_proj.weight[rows] @ x)
        result += probabilities[expert] / total * (maps.down_proj.weight[:, rows] @ neurons)
    if mlp.shared_expert is not None:
        result += torch.sigmoid(mlp.shared_expert_gate.weight @ x) * mlp.shared_expert(x)
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


def test_one_graph_for_all_routes():
    model = tiny_model(**SHARED_EXPERT)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_same(compiled(tokens(2, 9), use_cache=False).logits, model(tokens(2, 9), use_cache=False).logits)


def test_experts_change_places_along_with_the_rows_of_their_router():
    model = tiny_model(**EXPERTS)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(4), ["experts"])
    turned = g(model)
    assert_same(turned(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    with torch.no_grad():
        for layer, before in zip(turned.model.layers, model.model.layers, strict=True):
            assert not torch.equal(layer.mlp.gate.weight, before.mlp.gate.weight)
            layer.mlp.gate.weight.copy_(before.mlp.gate.weight)
    assert_different(turned(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_one_vector_for_all_rows_of_a_router_and_not_for_some():
    model = tiny_model(**EXPERTS)
    before = model(tokens(2, 9)).logits
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight += torch.linspace(-2, 2, 32, dtype=torch.float64)
        assert_same(model(tokens(2, 9)).logits, before)
        model.model.layers[1].mlp.gate.weight[0] += torch.linspace(-2, 2, 32, dtype=torch.float64)
        assert_different(model(tokens(2, 9)).logits, before)


def test_the_matrix_of_every_expert_is_updated_by_itself():
    table, mlp = table_of(tiny_config(**SHARED_EXPERT)), "model.layers.2.mlp."
    assert update_of(table, f"{mlp}experts.gate_proj.weight") == Update("polar", 4, 0)
    assert update_of(table, f"{mlp}experts.up_proj.weight") == Update("polar", 4, 0)
    assert update_of(table, f"{mlp}experts.down_proj.weight") == Update("polar", 4, 1)
    assert update_of(table, f"{mlp}gate.weight") == Update("polar", 1, 0)
    assert update_of(table, f"{mlp}shared_expert.down_proj.weight") == Update("polar", 1, 0)
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
