"""Ingredients of pretraining recipes: what their formulas say, neutral starts, refusals."""

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTForCausalLM
from tests.model.agreement import assert_different, assert_same
from tests.models import tiny_config, tiny_model, tokens


def test_the_stream_starts_from_normalised_embeddings():
    model = tiny_model(embedding_norm=True, position_embedding_type="learned")
    states = model(tokens(2, 9), output_hidden_states=True).hidden_states[0]
    base = model.model
    vectors = base.embed_tokens(tokens(2, 9)) + base.embed_positions.weight[:9]
    assert_same(states, vectors / (vectors.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt())
    assert_different(states, vectors)


class WithVectors(nn.Module):
    """A value projection that adds vectors of the tokens, written with explicit loops over heads."""

    def __init__(self, attention, input_ids):
        super().__init__()
        self.attention, self.input_ids, self.projection = attention, input_ids, attention.v_proj

    def forward(self, hidden_states):
        value, size = self.projection(hidden_states), self.attention.head_dim
        heads = []
        for head in range(value.shape[-1] // size):
            part = slice(head * size, (head + 1) * size)
            vectors = self.attention.value_embedding.weight[self.input_ids][..., part]
            gate = 2 / (1 + torch.exp(-(hidden_states @ self.attention.value_gate.weight[head])))
            heads.append(value[..., part] + gate[..., None] * vectors)
        return torch.cat(heads, dim=-1)


def test_tokens_add_gated_vectors_to_their_values():
    model = tiny_model(value_embedding_period=2, num_hidden_layers=4)
    owners = [index for index, layer in enumerate(model.model.layers) if layer.self_attn.value_embedding is not None]
    assert owners == [1, 3]
    by_hand = tiny_model(value_embedding_period=2, num_hidden_layers=4)
    for index in owners:
        attention = by_hand.model.layers[index].self_attn
        attention.v_proj = WithVectors(attention, tokens(2, 9))
    for index in owners:
        by_hand.model.layers[index].self_attn.gated_value_embedding = lambda hidden_states, input_ids: 0.0
    assert_same(by_hand(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    with torch.no_grad():
        for index in owners:
            model.model.layers[index].self_attn.value_embedding.weight.zero_()
    assert_different(by_hand(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_the_first_layer_has_no_value_embedding():
    model = tiny_model(value_embedding_period=1)
    assert [layer.self_attn.value_embedding is None for layer in model.model.layers] == [True, False, False]


def test_new_options_start_neutral():
    torch.manual_seed(0)
    plain = RiGPTForCausalLM(tiny_config()).eval()
    richer = RiGPTForCausalLM(tiny_config(value_embedding_period=1)).eval()
    missing, unexpected = richer.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 * 2 and not unexpected
    torch.testing.assert_close(richer(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)


def test_tables_of_values_grow_with_the_vocabulary():
    model = tiny_model(value_embedding_period=1, embedding_size=24)
    before = model(tokens(2, 9)).logits
    model.resize_token_embeddings(70)
    assert model.model.layers[1].self_attn.value_embedding.weight.shape == (70, 16)
    assert_same(model(tokens(2, 9)).logits[..., :61], before)
    assert model(torch.full((1, 3), 69)).logits.shape == (1, 3, 70)


def test_embeddings_in_place_of_tokens_are_refused():
    model = tiny_model(value_embedding_period=1)
    with pytest.raises(ValueError, match="`inputs_embeds` must be left out with `value_embedding_period=1`"):
        model(inputs_embeds=model.model.embed_tokens(tokens(1, 3)))
    plain = tiny_model()
    assert_same(plain(inputs_embeds=plain.model.embed_tokens(tokens(1, 3))).logits, plain(tokens(1, 3)).logits)
