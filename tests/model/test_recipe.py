"""Ingredients of pretraining recipes: what their formulas say, neutral starts, refusals."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

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


def test_scalars_mix_the_stream_with_its_beginning():
    """By hand: every layer but the first is fed `a x + b x0`."""
    model = tiny_model(residual_scalars=True)
    plain = tiny_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dict(model.named_parameters())[name])
    layers = model.model.layers
    assert layers[0].residual_weight is None
    weights = [(layer.residual_weight.item(), layer.embedding_weight.item()) for layer in layers[1:]]
    assert all(abs(a - 1) > 0.01 and abs(b) > 0.01 for a, b in weights)
    beginning: list[torch.Tensor] = []
    plain.model.layers[0].register_forward_pre_hook(lambda module, args: beginning.append(args[0]))
    for layer, (a, b) in zip(plain.model.layers[1:], weights, strict=True):
        layer.register_forward_pre_hook(lambda module, args, a=a, b=b: (a * args[0] + b * beginning[0], *args[1:]))
    with_hooks = plain(tokens(2, 9)).logits
    assert_same(with_hooks, model(tokens(2, 9)).logits)
    assert_different(with_hooks, tiny_model()(tokens(2, 9)).logits)


def test_the_previous_token_is_mixed_in():
    """With a loop over positions; the first has none before it."""
    model = tiny_model(previous_token_mixing=True, embedding_norm=True)
    plain = tiny_model(embedding_norm=True)
    vectors = model.model.embedding_norm(model.model.embed_tokens(tokens(2, 9)))
    covector, weight = model.model.previous_token.gate.weight[0], model.model.previous_token.weight
    mixed = [vectors[:, 0]]
    for place in range(1, 9):
        gate = weight / (1 + torch.exp(-(vectors[:, place] @ covector)))
        mixed.append(vectors[:, place] + gate[:, None] * vectors[:, place - 1])
    states = model(tokens(2, 9), output_hidden_states=True).hidden_states[0]
    assert_same(states, torch.stack(mixed, dim=1))
    assert_different(states, plain(tokens(2, 9), output_hidden_states=True).hidden_states[0])


MIXING = {"previous_token_mixing": True, "embedding_norm": True}


def test_padding_is_nobodys_previous():
    """Where positions count on from the padding, the mask alone says where a text begins."""
    model = tiny_model(**MIXING)
    padded = torch.cat([torch.full((1, 3), 7), tokens(1, 6)], dim=1)
    mask, places = torch.tensor([[0] * 3 + [1] * 6]), torch.arange(9)[None]
    alone = model(tokens(1, 6), position_ids=places[:, 3:], use_cache=False).logits
    assert_same(model(padded, attention_mask=mask).logits[:, 3:], alone)
    assert_different(model(padded).logits[:, 3:], alone)
    # And with a cache, where the mask is longer than what is new.
    for cut in (3, 5):
        first = model(padded[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
        second = model(padded[:, cut:], attention_mask=mask, past_key_values=first.past_key_values)
        assert_same(second.logits, alone[:, cut - 3 :])


def test_packed_texts_do_not_mix():
    model = tiny_model(**MIXING)
    ids, places = tokens(1, 11), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    packed = model(ids, position_ids=places, use_cache=False).logits
    assert_same(packed[:, :4], model(ids[:, :4]).logits)
    assert_same(packed[:, 4:], model(ids[:, 4:]).logits)
    assert_different(model(ids, use_cache=False).logits[:, 4:], packed[:, 4:])


@pytest.mark.parametrize("pieces", [[9], [4, 5], [1] * 9, [3, 1, 5]], ids=str)
def test_a_cache_remembers_the_previous_token(pieces):
    model = tiny_model(**MIXING)
    ids, cache, logits = tokens(2, 9), None, []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_same(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}],
    ids=["greedy", "beams", "static", "offloaded"],
)
def test_generation_remembers_it_too(options):
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator")
    model = tiny_model(**MIXING)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    beams = {"num_beams": options.get("num_beams", 1)}
    reference = model.generate(ids, use_cache=False, **settings, **beams)
    assert torch.equal(model.generate(ids, **settings, **options), reference)
    with torch.no_grad():
        model.model.previous_token.weight.zero_()
    assert not torch.equal(model.generate(ids, use_cache=False, **settings, **beams), reference)


def test_assisted_generation_takes_back_what_was_not_accepted(quiet_library):
    model, assistant = tiny_model(**MIXING), tiny_model(seed=1, **MIXING)
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    reference = model.generate(tokens(1, 6), use_cache=False, **settings)
    assert torch.equal(model.generate(tokens(1, 6), assistant_model=assistant, **settings), reference)


def test_caches_without_room_are_refused():
    model = tiny_model(**MIXING)
    with pytest.raises(ValueError, match="`past_key_values` must be made from the model's config .* got a DynamicC"):
        model(tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="`attn_implementation` must not be paged with `previous_token_mixing=True`"):
        model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="`attn_implementation` must not be paged with `previous_token_mixing=True`"):
        model(tokens(1, 3), cache=object())
    assert model(tokens(1, 3), past_key_values=DynamicCache(config=model.config)).logits.shape == (1, 3, 61)


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


@pytest.mark.parametrize("tied", [True, False])
def test_soft_capped_logits(tied):
    model = tiny_model(final_logit_softcapping=2.0, tie_word_embeddings=tied)
    plain = tiny_model(tie_word_embeddings=tied)(tokens(2, 9)).logits
    capped = model(tokens(2, 9), labels=tokens(2, 9))
    assert plain.abs().max() > 2.5
    assert_same(capped.logits, 2 * torch.tanh(plain / 2))
    assert capped.logits.abs().max() < 2
    assert_same(capped.loss, model.loss_function(logits=capped.logits, labels=tokens(2, 9), vocab_size=61))


def test_new_options_start_neutral():
    torch.manual_seed(0)
    plain = RiGPTForCausalLM(tiny_config()).eval()
    richer = RiGPTForCausalLM(tiny_config(residual_scalars=True, value_embedding_period=1)).eval()
    missing, unexpected = richer.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 * 2 + 2 * 2 and not unexpected
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


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_reach_the_beginning_through_checkpoints(reentrant):
    """The beginning of the stream goes to every layer besides the stream, and reentrant checkpoints are choosy."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model(residual_scalars=True, value_embedding_period=1).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert_same(gradients[1][name], gradient)


IMPOSSIBLE = {
    "period": ({"value_embedding_period": 0}, "`value_embedding_period` must be at least 1, got 0"),
    "one-layer": ({"value_embedding_period": 1, "num_hidden_layers": 1}, "`value_embedding_period` needs .* got 1"),
    "cap": ({"final_logit_softcapping": 0.0}, "`final_logit_softcapping` must be positive, got 0.0"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)
