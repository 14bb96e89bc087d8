"""Weights that Accelerate keeps elsewhere, and layers that a draft by early exit leaves out."""

import pytest
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.flow_rigpt import LayerBetween
from tests.model.agreement import assert_different, assert_same
from tests.models import ALL, OPTIONS, tiny_model, tokens


accelerate = pytest.importorskip("accelerate")
SETS = {
    "values": {"value_embedding_period": 1},
    "linear": {"depth_solver": "midpoint", "depth_interpolation": "linear"},
    "linear-own": {"depth_solver": "euler", "depth_interpolation": "linear"}
    | {"attention_score": "distance", "rotary_learned_frequencies": True},
    "local": {"local_frames": True, "embedding_size": 24},
    "distance": {"attention_score": "distance", "rotary_learned_frequencies": True},
}


@pytest.mark.parametrize("option", SETS)
@torch.no_grad()
@pytest.mark.by_default(3)
def test_offloaded_weights_give_the_same(option, tmp_path):
    model = tiny_model(dtype=torch.float32, **SETS[option])
    expected = model(tokens(2, 7)).logits
    model.save_pretrained(tmp_path / "model")
    offloaded = {
        "cpu": accelerate.cpu_offload(model, execution_device="cpu"),
        "disk": RiGPTForCausalLM.from_pretrained(
            tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
        ),
    }
    for where, model in offloaded.items():
        for _ in range(2):
            assert torch.equal(model(tokens(2, 7)).logits, expected), where
            assert {p.device.type for p in model.parameters()} == {"meta"}, where
        assert model.generate(tokens(1, 5), max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 7)


def test_quantized_neighbours_are_not_added():
    layers = tiny_model(depth_solver="euler", depth_interpolation="linear").model.layers
    for layer in layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"must not meet quantized ones, got 'mlp.up_proj.weight' of torch.uint8"):
        LayerBetween(layers[0], layers[1])


EARLY = {"rotary", "learned-projected", "distance", "value-embeddings", "local-frames-projected", "midpoint", "linear"}


@pytest.mark.parametrize("option", sorted(EARLY))
@torch.no_grad()
@pytest.mark.by_default(4)
def test_early_exit_generates_the_same(option, quiet_library):
    model = tiny_model(**ALL[option])
    asked = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(1, 5), **asked)
    logits, calls = model(tokens(2, 7)).logits, []
    model.model.layers[2].register_forward_hook(lambda *_: calls.append(2))
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(0))
    for layers in (1, 2):
        calls.clear()
        assert torch.equal(model.generate(tokens(1, 5), assistant_early_exit=layers, **asked), expected)
        assert 0 < calls.count(2) < calls.count(0), "no draft left a layer out"
    assert torch.equal(model(tokens(2, 7)).logits, logits)


@torch.no_grad()
def test_a_draft_does_not_depend_on_the_frames(turned):
    model, other, _ = turned("local-frames")
    drafts = []
    for each in (model, other):
        each.config.num_hidden_layers = 1
        drafts.append(each(tokens(2, 7)).logits)
        each.config.num_hidden_layers = 3
    assert_same(drafts[1], drafts[0])
    assert_different(model(tokens(2, 7)).logits, drafts[0])
    assert OPTIONS["local-frames"] == {"local_frames": True}
