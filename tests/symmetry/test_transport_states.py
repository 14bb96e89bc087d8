"""Training goes on in a disguise with what an optimizer remembers, once that is carried there."""

import copy

import pytest
import torch
from torch import nn

from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry import GaugeTransformation, transport
from tests.models import ALL, tiny_model, tokens
from tests.symmetry.options import generator
from tests.tolerances import TRAINING


BATCHES = [tokens(4, 17, seed=seed) for seed in range(4)]


def train(model: nn.Module, optimizer, batches) -> None:
    model.train()
    for ids in batches:
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def equivariant(model: nn.Module) -> EquivariantOptimizer:
    return EquivariantOptimizer(equivariant_param_groups(model, lr=3e-3), polar="svd")


@torch.no_grad()
def apart(a: nn.Module, b: nn.Module, start: nn.Module) -> float:
    pairs = [list(model.parameters()) for model in (a, b, start)]
    squares = [sum(float((p - q).square().sum()) for p, q in zip(x, pairs[0], strict=True)) for x in pairs[1:]]
    return (squares[0] / squares[1]) ** 0.5


@pytest.mark.parametrize(
    "option",
    [
        "learned-untied-projected",
        "experts-shared",
        "gain-metric-learned",
        "norm-bias-vector",
        "squared-distance-learned-frequencies",
    ],
)
@pytest.mark.by_default(2)
def test_training_goes_on_in_a_disguise_with_the_state_of_the_optimizer(option):
    a = tiny_model(**ALL[option])
    optimizer = equivariant(a)
    train(a, optimizer, BATCHES)
    g = GaugeTransformation.random(a.config, generator(3), "all", compact=True)
    start, state = g(a), copy.deepcopy(optimizer.state_dict())
    ends = {}
    for name, given in (("carried", transport(state, g)), ("as it was", state), ("none", None)):
        b = copy.deepcopy(start)
        own = equivariant(b)
        if given is not None:
            own.load_state_dict(copy.deepcopy(given))
        train(b, own, BATCHES[:2])
        ends[name] = b
    train(a, optimizer, BATCHES[:2])
    assert apart(g(a), ends["carried"], start) <= TRAINING
    for name in ("as it was", "none"):
        assert apart(g(a), ends[name], start) > 0.01, f"the state {name} does it too: the test sees nothing"


def test_states_without_an_exact_form_are_refused():
    a = tiny_model()
    adamw = torch.optim.AdamW(a.parameters(), lr=1e-3)
    train(a, adamw, BATCHES[:1])
    compact = GaugeTransformation.random(a.config, generator(3), "all", compact=True)
    with pytest.raises(ValueError, match="AdamW's second moments are squares of single coordinates"):
        transport(adamw.state_dict(), compact)
    optimizer = equivariant(a)
    train(a, optimizer, BATCHES[:1])
    state = optimizer.state_dict()
    assert transport(state, compact)["param_groups"] == state["param_groups"]
    with pytest.raises(ValueError, match=r"`g` must keep lengths in the frames of `model.layers.0.self_attn.v_proj"):
        transport(state, GaugeTransformation.random(a.config, generator(3), "head_vo"))
    with pytest.raises(ValueError, match=r"got a translation in 'layers.0.value_shift'"):
        transport(state, GaugeTransformation.random(a.config, generator(3), "value_shift"))
