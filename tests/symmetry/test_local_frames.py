"""A frame per layer: exact both ways for every option, flat by construction, and what that means."""

import copy
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rigpt_hf.conversion import convert_model, export_model
from rigpt_hf.flow.gauge_fixing import follow_decay
from rigpt_hf.optim import equivariant_param_groups
from rigpt_hf.pictures.local_frames import connection_errors, velocity
from rigpt_hf.symmetry import (
    GaugeTransformation,
    align,
    canonicalize,
    charge_drift,
    connection,
    curvature,
    gauge_distance,
    gauge_error,
    haar,
    holonomy,
    invariants,
    merge,
    so_exp,
    to_global_frame,
    to_local_frames,
)
from tests.conversion.sources import stock_model
from tests.model.agreement import assert_different, assert_same
from tests.models import OPTIONS, noisy, over, tiny_model, tokens
from tests.symmetry.options import difference, generator
from tests.tolerances import CANONICAL, SYMMETRY


GLOBAL = [name for name, options in OPTIONS.items() if not {"local_frames", "post_norm"} & options.keys()]


def rotations(model, seed: int = 1) -> torch.Tensor:
    draw = generator(seed)
    return torch.stack([haar(model.config.hidden_size, draw) for _ in range(model.config.num_hidden_layers)])


@over(["learned-projected", "rotary-learned", "recipe", "depth"], GLOBAL)
def test_every_option_may_have_local_frames_and_lose_them_again(turned, option):
    model = turned(option).model
    turns = rotations(model)
    local = to_local_frames(model, turns)
    assert local.config.local_frames and not model.config.local_frames
    assert_same(local(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    weights = (local.model.layers[1].self_attn.v_proj.weight, model.model.layers[1].self_attn.v_proj.weight)
    assert_different(*weights)
    assert_same(weights[0], weights[1] @ turns[1].T)
    again = to_global_frame(local)
    assert again.config.to_dict() == model.config.to_dict()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert difference(again, model) <= SYMMETRY[torch.float64]


def test_transports_are_the_rotations_from_frame_to_frame():
    model = tiny_model()
    turns = rotations(model)
    local = to_local_frames(model, turns)
    expected = [turns[0], turns[1] @ turns[0].T, turns[2] @ turns[1].T, turns[2].T]
    assert_same(connection(local), torch.stack(expected))
    # And a second time on top of the first.
    twice = to_local_frames(local, turns)
    assert_same(connection(twice)[1], turns[1] @ turns[1] @ turns[0].T @ turns[0].T)
    assert_same(twice(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_a_wrong_transport_is_seen():
    """Negative control: the maps between frames do something, and nothing but the right ones will do."""
    local = tiny_model(local_frames=True)
    before = local(tokens(2, 9)).logits
    with torch.no_grad():
        local.model.layers[1].transport.weight.copy_(torch.eye(32))
    assert_different(local(tokens(2, 9)).logits, before)
    with pytest.raises(ValueError, match=r"`model` must have transports whose product is the identity, to .* got a"):
        to_global_frame(local)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_connection_is_flat_and_stays_so(dtype):
    model = tiny_model(local_frames=True, dtype=dtype)
    assert holonomy(model) <= SYMMETRY[dtype]
    g = GaugeTransformation.random(model.config, generator(2), "all")
    assert len([key for key in g.elements if key.endswith(".local")]) == 3
    turned = g(model)
    assert holonomy(turned) <= SYMMETRY[dtype]
    assert (connection(turned) - connection(model)).abs().max() > 0.1, "nothing turned"
    assert gauge_error(model, g, tokens(2, 9)) <= SYMMETRY[dtype]
    with torch.no_grad():
        model.model.transport.weight.copy_(-model.model.transport.weight)
    assert holonomy(model) > 1


def test_no_plaquette_has_curvature_unless_a_transport_depends_on_the_position():
    transports = connection(tiny_model(local_frames=True))
    everywhere = transports[:, None].expand(-1, 5, -1, -1)
    assert curvature(everywhere) <= SYMMETRY[torch.float64]
    skew = torch.randn(32, 32, generator=generator(), dtype=torch.float64)
    bent = everywhere.clone()
    bent[1, 3] = so_exp(0.1 * (skew - skew.T)) @ bent[1, 3]
    assert curvature(bent) > 0.01
    with pytest.raises(ValueError, match=r"`transports` must be \[layers, positions >= 2, d, d\], got shape \[4, 32"):
        curvature(transports)


def test_a_model_can_be_made_with_local_frames_and_starts_with_one(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    local = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, local_frames=True)
    assert_same(local(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert torch.equal(connection(local), torch.eye(32).double().expand(4, -1, -1))
    assert not any(parameter.requires_grad for name, parameter in local.named_parameters() if "transport" in name)


def test_saved_frames_come_back_frozen(tmp_path):
    model = tiny_model(local_frames=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(connection(loaded), connection(model))
    frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.layers.{index}.transport.weight" for index in range(3)] + ["model.transport.weight"]
    names = {name for group in equivariant_param_groups(loaded, lr=1.0) for name in group["names"]}
    assert names and not names & set(frozen)


def test_a_converted_model_may_have_them_and_is_exported_all_the_same():
    stock = stock_model("gpt2")
    model = convert_model(stock)
    local = to_local_frames(model, rotations(model))
    ids = tokens(2, 9, vocab_size=stock.config.vocab_size)
    assert_same(local(ids).logits, stock(ids).logits)
    assert_same(export_model(local, "gpt2")(ids).logits, stock(ids).logits)


def test_the_canonical_form_has_one_frame():
    model = tiny_model(position_embedding_type="learned", num_hidden_layers=2)
    local = to_local_frames(model, rotations(model))
    canonical = canonicalize(local)
    assert_same(connection(canonical), torch.eye(32).double().expand(3, -1, -1))
    plain = canonicalize(model)
    for name, weight in plain.state_dict().items():
        bound = CANONICAL[torch.float64] * max(weight.abs().max(), 1.0)
        assert (canonical.state_dict()[name] - weight).abs().max() <= bound, name
    spectra = invariants(local)
    for name, values in invariants(model).items():
        assert_same(spectra[name], values)


def test_models_in_different_local_frames_are_aligned_and_merged():
    """As if they had one frame: the distance, what aligning finds, and the average."""
    model = tiny_model(position_embedding_type="learned", num_hidden_layers=2)
    other = noisy(model, 0.01)
    a, b = to_local_frames(model, rotations(model, 1)), to_local_frames(other, rotations(model, 2))
    far = sum(float((x - y).square().sum()) for x, y in zip(a.parameters(), b.parameters(), strict=True)) ** 0.5
    assert abs(gauge_distance(a, b) - gauge_distance(model, other)) < 1e-6
    moved = align(a, b)(a)
    near = sum(float((x - y).square().sum()) for x, y in zip(moved.parameters(), b.parameters(), strict=True)) ** 0.5
    assert near < 0.05 * far
    merged, expected = merge([a, b]), merge([model, other])
    logits = merged(tokens(2, 9)).logits
    assert (logits - expected(tokens(2, 9)).logits).abs().max() < 1e-5 * logits.abs().max()
    assert_different(logits, b(tokens(2, 9)).logits)


def test_impossible_rotations_are_named():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`rotations` must be orthogonal matrices of shape \[3, 32, 32\], got shape"):
        to_local_frames(model, rotations(model)[:2])
    with pytest.raises(ValueError, match=r"`rotations` must be orthogonal .*, orthogonal to 3\.0e\+00\. Draw them"):
        to_local_frames(model, 2 * rotations(model))
    with pytest.raises(ValueError, match="`model` must have `local_frames=True`, got a model with one frame"):
        holonomy(model)


def test_the_logarithm_of_a_transport_tends_to_the_connection():
    errors = connection_errors([0.1, 0.05, 0.025])
    for coarse, fine in pairwise(errors):
        assert abs(coarse / fine - 4) < 0.1, "not of second order, as a step is from its middle"
    # Negative control: against the connection elsewhere there is nothing to tend to.
    skew = torch.randn(2, 6, 6, generator=generator(), dtype=torch.float64)
    here, there = (velocity(torch.tensor(t).double(), (skew - skew.mT) / 6) for t in (0.7, 0.9))
    assert (here - there).norm() > 50 * errors[-1] * here.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flatness_is_asked_for_in_16_bits_too(dtype):
    local = tiny_model(local_frames=True, dtype=dtype)
    assert not to_global_frame(local).config.local_frames
    with torch.no_grad():
        local.model.layers[1].transport.weight.copy_(torch.eye(32))
    with pytest.raises(ValueError, match="`model` must have transports whose product is the identity"):
        to_global_frame(local)


def test_nothing_learns_a_transport():
    """Not descent that follows charges, and not adapters on every linear map."""
    model = tiny_model(local_frames=True, attention_score="dot")
    report = charge_drift(model, tokens(2, 9), learning_rates=[0.02], time=0.2, weight_decay=0.5)
    assert report.descents[0].losses[-1] < report.descents[0].losses[0]
    trained, _ = follow_decay(model, [tokens(2, 9)], 0.02, 0.05, 10, 10)
    assert torch.equal(connection(trained), connection(model))
    moved = (trained.model.layers[0].mlp.up_proj.weight - model.model.layers[0].mlp.up_proj.weight).abs().max()
    assert moved > 1e-4
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", r=2))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and not any("transport" in name for name in names)


def test_weights_with_local_frames_are_not_loaded_without(tmp_path):
    tiny_model(local_frames=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`local_frames` must be True for weights that have them, got False. Load"):
        AutoModelForCausalLM.from_pretrained(tmp_path, local_frames=False)


def test_what_was_frozen_stays_so_and_bare_models_are_named():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    local = to_local_frames(model, rotations(model))
    assert not local.model.embed_tokens.weight.requires_grad and local.model.layers[0].mlp.up_proj.weight.requires_grad
    for function, bare in ((to_local_frames, model.model), (to_global_frame, local.model), (holonomy, local.model)):
        with pytest.raises(ValueError, match="which is the bare `RiGPTModel`'s. Pass the `RiGPTForCausalLM`"):
            function(bare)
