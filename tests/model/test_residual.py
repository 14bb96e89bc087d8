"""Attention and MLP of a layer, one after the other or both at once: `use_parallel_residual`."""

import copy

import pytest
import torch

from rigpt_hf.symmetry import GaugeTransformation
from tests.models import tiny_model, tokens
from tests.tolerances import SYMMETRY


PARALLEL = {"use_parallel_residual": True}


def normalised(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attended(layer, x: torch.Tensor) -> torch.Tensor:
    """Attention of the layer on `x` `[B, S, d]`, without positions."""
    mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)
    return layer.self_attn(x, attention_mask=mask)[0]


@torch.no_grad()
@pytest.mark.parametrize("local", [False, True])
def test_a_layer_is_what_it_says(local):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {}
    for parallel in (False, True):
        options = {"position_embedding_type": "learned", "local_frames": local, "use_parallel_residual": parallel}
        layer = tiny_model(**options).model.layers[1]
        moved = x @ layer.transport.weight.T if local else x
        attention = attended(layer, normalised(moved))
        read = moved if parallel else moved + attention
        expected = moved + attention + layer.mlp(normalised(read))
        mask = torch.full((5, 5), float("-inf"), dtype=x.dtype).triu(1)
        made[parallel] = layer(x, attention_mask=mask)
        assert (made[parallel] - expected).abs().max() <= SYMMETRY[torch.float64] * expected.abs().max()
    assert (made[True] - made[False]).abs().max() > 0.1


def test_each_branch_has_a_coin_of_its_own():
    layer = tiny_model(**PARALLEL, residual_dropout=0.5, position_embedding_type="learned").model.layers[0].train()
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        attention, mlp = attended(layer, normalised(x)), layer.mlp(normalised(x))
        mask = torch.full((64, 64), float("-inf"), dtype=x.dtype).triu(1)
        left = layer(x, attention_mask=mask) - x
    seen = set()
    for token in range(64):
        outcomes = [(a, m) for a in (0, 2) for m in (0, 2)]
        apart = [(left[0, token] - a * attention[0, token] - m * mlp[0, token]).abs().max() for a, m in outcomes]
        assert min(apart) <= SYMMETRY[torch.float64] * x.abs().max()
        seen.add(outcomes[int(torch.stack(apart).argmin())])
    assert len(seen) == 4


def test_biases_of_the_branches_are_one_only_side_by_side():
    parallel = tiny_model(**PARALLEL)
    g = GaugeTransformation.random(parallel.config, torch.Generator().manual_seed(0), ["residual_shift"])
    serial = tiny_model()
    for model, same in ((parallel, True), (serial, False)):
        turned = copy.deepcopy(model)
        turned.load_state_dict(g(parallel).state_dict() if same else moved_biases(model, g))
        error = (turned(tokens(2, 9)).logits - model(tokens(2, 9)).logits).abs().max()
        assert error <= SYMMETRY[torch.float64] if same else error > 0.01


def moved_biases(model, g: GaugeTransformation) -> dict[str, torch.Tensor]:
    """The same constants moved from MLP to attention in a model whose table has no such frame."""
    state = model.state_dict()
    for name, element in g.elements.items():
        layer = f"model.{name.rpartition('.')[0]}"
        state[f"{layer}.mlp.down_proj.bias"] = state[f"{layer}.mlp.down_proj.bias"] + element[0]
        state[f"{layer}.self_attn.o_proj.bias"] = state[f"{layer}.self_attn.o_proj.bias"] - element[0]
    return state


def test_both_branches_read_one_norm():
    parallel, serial = tiny_model(**PARALLEL), tiny_model()
    assert all(layer.post_attention_layernorm is None for layer in parallel.model.layers)
    assert all(layer.post_attention_layernorm is not None for layer in serial.model.layers)
    assert parallel.state_dict().keys() == serial.state_dict().keys()
