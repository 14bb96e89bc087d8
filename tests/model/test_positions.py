"""Positions: every rope type as Llama has it, learned frequencies, the learned table, and counting on from a cache."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rigpt_hf import RiGPTForCausalLM, RiGPTModel
from rigpt_hf.rope_rigpt import RiGPTRotaryEmbedding
from tests.model.agreement import assert_different, assert_same
from tests.models import OPTIONS, randomise_, tiny_config, tiny_model, tokens


THETA = {"rope_theta": 1000.0}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
FIXED = [name for name in ROPES if name not in ("dynamic", "longrope")]


def llama_twin(rope):
    """A Llama without gains, and a RiGPT with its weights."""
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    theirs = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=THETA | rope)).eval()
    randomise_(theirs, 0)
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
    config = tiny_config(
        **shape, gated_mlp=True, attention_bias=False, attention_output_bias=False, mlp_bias=False,
        rope_parameters=THETA | rope,
    )  # fmt: skip
    ours = RiGPTForCausalLM(config).eval()
    ours.load_state_dict({name: weight for name, weight in theirs.state_dict().items() if "norm" not in name})
    return theirs, ours


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_every_rope_type_is_llamas(rope):
    theirs, ours = llama_twin(rope)
    for length in (9, 30, 9):  # within and beyond what the rope was made for, and back
        assert_same(ours(tokens(2, length)).logits, theirs(tokens(2, length)).logits, f"{length} tokens")


def test_the_rope_types_differ():
    outputs = []
    for rope in ROPES.values():
        _, ours = llama_twin({"rope_type": "default"})
        config = tiny_config(max_position_embeddings=16, rope_parameters=THETA | rope)
        ours.model.rotary_emb = RiGPTRotaryEmbedding(config)
        outputs.append(ours(tokens(2, 30)).logits)
    for index, a in enumerate(outputs):
        for b in outputs[:index]:
            assert_different(a, b)


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn"])
def test_a_partial_rotation_leaves_the_other_dimensions_alone(rope_type):
    model = tiny_model(rope_parameters=ROPES[rope_type] | THETA | {"partial_rotary_factor": 0.5})
    cos, _ = model.model.rotary_emb(torch.zeros(1), torch.arange(5)[None])
    assert cos.shape == (1, 5, 4)
    whole = tiny_model(rope_parameters=ROPES[rope_type] | THETA)
    whole.load_state_dict(model.state_dict())
    assert_different(model(tokens(2, 9)).logits, whole(tokens(2, 9)).logits)


@pytest.mark.parametrize("name", FIXED)
def test_learned_frequencies_start_at_the_fixed_ones(name):
    rope = {"rope_parameters": THETA | ROPES[name], "num_hidden_layers": 2}
    torch.manual_seed(0)
    fixed = RiGPTForCausalLM(tiny_config(**rope)).eval()
    learned = RiGPTForCausalLM(tiny_config(**rope, rotary_learned_frequencies=True)).eval()
    missing, unexpected = learned.load_state_dict(fixed.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("rotary_frequencies") for key in missing)
    assert_same(learned(tokens(2, 20)).logits, fixed(tokens(2, 20)).logits)
    learned.model.layers[0].self_attn.rotary_frequencies.data += 0.1
    assert_different(learned(tokens(2, 20)).logits, fixed(tokens(2, 20)).logits)


def test_learned_frequencies_are_per_layer_and_head_and_get_gradients():
    model = tiny_model(rotary_learned_frequencies=True)
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.rotary_frequencies.shape == (2, 4)
        assert (layer.self_attn.rotary_frequencies.grad != 0).all()


def test_frequencies_that_depend_on_the_length_cannot_be_learned():
    for name in ROPES.keys() - FIXED:
        with pytest.raises(ValueError, match=f"`rotary_learned_frequencies` needs a `rope_type` .* got '{name}'"):
            tiny_config(rope_parameters=THETA | ROPES[name], rotary_learned_frequencies=True)


def test_the_rotary_module_is_made_as_the_library_makes_them():
    config = tiny_config()
    rotary = RiGPTRotaryEmbedding(config=config, device="cpu")
    assert rotary.inv_freq.dtype == torch.float32
    config.rope_parameters |= {"rope_type": "linear", "factor": 10.0}
    linear = RiGPTRotaryEmbedding(config=config, device="cpu")
    positions = torch.arange(40)[None]
    cos, linear_cos = (module(torch.zeros(1), positions)[0] for module in (rotary, linear))
    assert_same(linear_cos[:, ::10], cos[:, :4])


def test_word_order_matters():
    for option in ("learned", "rotary", "rotary-learned"):
        model, input_ids = tiny_model(**OPTIONS[option]), tokens(1, 6)
        swapped = input_ids[:, [1, 0, 2, 3, 4, 5]]
        assert_different(model(swapped).logits[:, -1], model(input_ids).logits[:, -1])


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_buffers_survive_the_meta_device(rope, tmp_path):
    expected = RiGPTModel(tiny_config(rope_parameters=THETA | rope))
    with torch.device("meta"):
        model = RiGPTModel(tiny_config(rope_parameters=THETA | rope))
    model.to_empty(device="cpu").init_weights()
    expected.save_pretrained(tmp_path)
    loaded = RiGPTModel.from_pretrained(tmp_path)
    names = [name for name, _ in expected.named_buffers()]
    assert names == ["rotary_emb.inv_freq", "rotary_emb.original_inv_freq"]
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer) and torch.equal(loaded.get_buffer(name), buffer), name


def test_16_bit_weights_do_not_round_the_angles():
    model = tiny_model(dtype=torch.float32).bfloat16()
    exact = tiny_model(dtype=torch.float32)
    positions = torch.tensor([[40000, 40001]])
    cos, _ = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    expected, _ = exact.model.rotary_emb(torch.zeros(1), positions)
    if model.model.rotary_emb.inv_freq.dtype == torch.float32:
        assert (cos - expected).abs().max() < 0.01
