"""Weighted moments against a plain loop, and what they are of in other frames."""

import pytest
import torch

from rigpt_hf.modeling_rigpt import RiGPTForCausalLM
from rigpt_hf.quantization import all_moments, moments_by_layer
from rigpt_hf.quantization.frames import turned_moments
from rigpt_hf.quantization.maps import parts_of, token_tables
from rigpt_hf.symmetry import GaugeTransformation

from ..models import ALL, tiny_model, tokens
from ..tolerances import SYMMETRY


SETS = ("gated", "parallel-local-projected", "post-norm-alone", "value-embeddings")


def by_hand(model: RiGPTForCausalLM, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """The moments of a plain layer without a bias to its norms, token by token, head by head."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=row, output_hidden_states=True, output_attentions=True, use_cache=False)
    result = {}
    for index, layer in enumerate(model.model.layers):
        stream, attention = output.hidden_states[index][0], output.attentions[index][0]
        normalised = layer.input_layernorm(stream)
        values = (normalised @ layer.self_attn.v_proj.weight.T + layer.self_attn.v_proj.bias).unflatten(-1, (2, -1))
        heads = torch.cat([attention[head] @ values[:, head // 2] for head in range(4)], dim=-1)
        after = stream + layer.self_attn.o_proj(heads)
        second = layer.post_attention_layernorm(after)
        neurons = layer.mlp.neurons(second)
        following = after + layer.mlp.down_proj(neurons)
        count = len(stream)
        size, last = after.square().mean(-1), following.square().mean(-1)
        key = torch.zeros(count, dtype=stream.dtype)
        value = torch.zeros(count, dtype=stream.dtype)
        for head in range(4):
            for query in range(count):
                for seen in range(count):
                    probability = attention[head, query, seen]
                    key[seen] += probability * (1 - probability) / size[query]
                    value[seen] += probability**2 / size[query]
        weighted = {
            "self_attn.q_proj": (normalised, 1 / size),
            "self_attn.k_proj": (normalised, key),
            "self_attn.v_proj": (normalised, value),
            "self_attn.o_proj": (heads, 1 / size),
            "mlp.gate_proj": (second, 1 / last),
            "mlp.up_proj": (second, 1 / last),
            "mlp.down_proj": (neurons, 1 / last),
        }
        for name, (inputs, weights) in weighted.items():
            result[f"model.layers.{index}.{name}"] = (inputs * weights[:, None]).T @ inputs
    return result


def test_moments_are_those_of_a_plain_loop():
    model = tiny_model(**ALL["gated"])
    rows = tokens(2, 9)
    found = all_moments(model, rows)
    expected = [by_hand(model, row[None]) for row in rows]
    assert set(found) == set(expected[0]) == set(parts_of(model)) and len(found) == 21
    for name, moments in found.items():
        plain = expected[0][name] + expected[1][name]
        assert (moments - plain).abs().max() <= SYMMETRY[torch.float64] * plain.abs().max(), name
    first = {name.rpartition(".")[2]: moments for name, moments in found.items() if ".0." in name}
    assert first["gate_proj"] is first["up_proj"]
    # Queries, keys and values read the same and weigh it differently.
    for other in ("k_proj", "v_proj"):
        assert (first["q_proj"] / first["q_proj"].norm() - first[other] / first[other].norm()).norm() > 0.01


@pytest.mark.parametrize("option", SETS)
def test_moments_turn_with_all_frames(option):
    model, rows = tiny_model(**ALL[option]), tokens(3, 12)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "all")
    # Exchanged heads and neurons change places among moments too; translations change the inputs themselves.
    elements = {name: element for name, element in g.linear().elements.items()}
    g = GaugeTransformation(model.config, elements)
    before, after = all_moments(model, rows), all_moments(g(model), rows)
    assert len(before) == len(parts_of(model)) > 10
    changed = 0
    for name, moments in before.items():
        turned = turned_moments(g.inverse(), f"{name}.weight", moments)
        assert (turned - after[name]).abs().max() <= SYMMETRY[torch.float64] * turned.abs().max(), name
        changed += int((moments - after[name]).abs().max() > 0.01 * turned.abs().max())
    assert changed > 0.9 * len(before)


def test_layer_by_layer_is_the_whole_model_and_leaves_it_alone():
    model = tiny_model(**ALL["untied-projected"]).train()
    model.set_attn_implementation("sdpa")
    parts = list(moments_by_layer(model, tokens(2, 8)))
    assert [len(part) for part in parts] == [1, 6, 6, 6, 1]
    assert set(parts[0]) == {"model.project_in"} and set(parts[-1]) == {"model.project_out"}
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_have_moments_of_their_own():
    model, rows = tiny_model(**ALL["experts-shared"]), tokens(2, 10)
    found = all_moments(model, rows)
    down = found["model.layers.0.mlp.experts.down_proj"]
    assert down.shape == (4, 12, 12) and (down.diagonal(dim1=1, dim2=2).sum(1) > 0).all()
    assert found["model.layers.0.mlp.shared_expert.down_proj"].shape == (20, 20)


def test_which_matrices_are_rounded():
    names = {name.rpartition(".")[2] for name in parts_of(tiny_model(**ALL["value-embeddings"]))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}  # no gates, no head
    assert token_tables(tiny_model(**ALL["rotary"])) == ["model.embed_tokens"]
    assert token_tables(tiny_model(**ALL["untied"])) == ["model.embed_tokens", "lm_head"]
    assert len(token_tables(tiny_model(**ALL["value-embeddings"]))) == 2


def test_what_cannot_be_calibrated_with_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"`calibration` must be windows \[N, S\] of at least two tokens"):
        all_moments(model, tokens(3, 1))
    with pytest.raises(ValueError, match="`calibration` must hold tokens below 61, got 61"):
        all_moments(model, torch.full((1, 4), 61))
    with pytest.raises(ValueError, match="`depth_solver='euler'` goes through each layer many times"):
        all_moments(tiny_model(depth_solver="euler"), tokens(1, 8))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`model` must give finite numbers on the calibration text, got NaN or infin"):
        all_moments(model, tokens(1, 8))
