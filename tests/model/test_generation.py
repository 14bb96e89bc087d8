"""Generation: every strategy and every cache gives what the model without a cache gives."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, pipeline, set_seed

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.flow_rigpt import evaluations_per_layer
from rigpt_hf.layers_rigpt import window_of
from tests.model.agreement import assert_different, assert_same
from tests.models import ALIBI, ALL, COVER, EACH, OPTIONS, SINKS, over, tiny_model, tokens


# Every kind of position, score, head and way through depth at least once.
KINDS = {
    "learned": {"position_embedding_type": "learned", "attention_score": "distance", "embedding_size": 24},
    "rotary": {"qk_norm": True, "local_frames": True, "depth_solver": "euler", "depth_steps": 2},
    "frequencies": {
        "rotary_learned_frequencies": True,
        "attention_score": "squared_distance",
        "tie_word_embeddings": False,
        "depth_solver": "midpoint",
        "depth_interpolation": "linear",
    },
    "alibi": ALIBI,
    "sinks": SINKS,
    "plain": {},
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request) -> RiGPTForCausalLM:
    return tiny_model(**request.param)


@torch.no_grad()
def without_cache(model, input_ids, count=8):
    """Greedy decoding, the whole sequence anew for every token."""
    for _ in range(count):
        following = model(input_ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat((input_ids, following), dim=1)
    return input_ids


CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded-static": {"cache_implementation": "offloaded_static", "disable_compile": True},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.by_default(6)
def test_every_cache_gives_the_same_tokens(model, cache):
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("offloaded caches move between an accelerator and the host, and there is no accelerator")
    input_ids = tokens(2, 7)
    assert torch.equal(model.generate(input_ids, **CACHES[cache], **GREEDY), without_cache(model, input_ids))


@torch.no_grad()
@over(EACH, [*COVER, *OPTIONS])
def test_a_cache_gives_the_same_logits_piece_by_piece(option):
    """Any cache, positions counted on from it or given, after a crop; and it holds plain keys of the config's size."""
    model, input_ids = tiny_model(**ALL[option]), tokens(2, 12)
    expected = model(input_ids, use_cache=False).logits
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        positions = torch.arange(start, stop)[None]
        for cache, given in ((dynamic, None), (static, positions)):
            piece = model(input_ids[:, start:stop], past_key_values=cache, position_ids=given).logits
            assert_same(piece, expected[:, start:stop], f"tokens {start} to {stop}")
    config = model.config
    assert len(dynamic) == config.num_hidden_layers * evaluations_per_layer(config)
    windows = [window_of(config, layer) for layer in range(config.num_hidden_layers)]
    for index, layer in enumerate(dynamic.layers):
        window = windows[index // evaluations_per_layer(config)]
        held = 12 if window is None else min(12, window - 1)
        assert layer.keys.shape == layer.values.shape == (2, config.num_key_value_heads, held, config.head_dim)
    if any(windows):  # what has left a window cannot come back
        return
    dynamic.crop(-7)
    assert_same(model(input_ids[:, 5:], past_key_values=dynamic).logits, expected[:, 5:], "after a crop")
    dynamic.crop(-7)
    forgetful = model(input_ids[:, 5:], past_key_values=dynamic, position_ids=torch.arange(7)[None]).logits
    assert_different(forgetful, expected[:, 5:])


def test_the_cache_holds_keys_that_know_no_weight_of_the_score():
    model, keys = tiny_model(attention_score="squared_distance"), []
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        model(tokens(2, 5), past_key_values=cache)
        keys.append(cache.layers[0].keys)
        for layer in model.model.layers:
            layer.self_attn.distance_weight.data += 1
    assert torch.equal(*keys)


def test_left_padding_changes_nothing(model):
    input_ids = tokens(2, 7)
    padding = torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat((padding, input_ids), dim=1)
    mask = torch.cat((padding, torch.ones_like(input_ids)), dim=1)
    expected = without_cache(model, input_ids)
    actual = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(actual[:, 4:], expected)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    assert_same(
        model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:], model(input_ids).logits, "the logits"
    )
    seen = model(padded, attention_mask=torch.ones_like(mask), position_ids=positions).logits[:, 4:]
    assert_different(seen, model(input_ids).logits)


def test_a_batch_of_unequal_lengths_equals_single_sequences(model):
    prompts = [tokens(1, length, seed=length) for length in (3, 8, 5)]
    padded = torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in zip(padded, prompts, strict=True):
        row[8 - prompt.shape[1] :] = prompt
    batch = model.generate(padded, attention_mask=(padded != 0).long(), **GREEDY)
    for row, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(row[8 - prompt.shape[1] :], without_cache(model, prompt)[0])


def test_beam_search_needs_no_cache_to_find_the_same(model):
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    with_cache = model.generate(tokens(2, 7), **beams)
    assert with_cache.shape == (4, 15)
    assert torch.equal(with_cache, model.generate(tokens(2, 7), use_cache=False, **beams))


@pytest.mark.by_default(3)
def test_sampling_is_reproducible(model):
    sampled = GREEDY | {"do_sample": True, "top_k": 20}
    outputs = []
    for seed, cache in ((1, True), (1, False), (2, True)):
        set_seed(seed)
        outputs.append(model.generate(tokens(2, 7), use_cache=cache, **sampled))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.by_default(3)
def test_an_assistant_changes_nothing(model, quiet_library):
    input_ids = tokens(1, 7)
    expected = without_cache(model, input_ids)
    small = tiny_model(1, hidden_size=16, num_hidden_layers=1)
    small.generation_config.eos_token_id = None
    for assistant in (small, model):
        assert torch.equal(model.generate(input_ids, assistant_model=assistant, **GREEDY), expected)
    repeating = torch.cat((input_ids, input_ids), dim=1)
    looked_up = model.generate(repeating, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(looked_up, without_cache(model, repeating))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.by_default(6)
def test_embeddings_may_be_given_instead_of_tokens(model, cache):
    input_ids = tokens(2, 7)
    embeddings = model.get_input_embeddings()(input_ids)
    assert embeddings.shape[-1] == model.config.lexical_size
    actual = model.generate(inputs_embeds=embeddings, **CACHES[cache], **GREEDY)
    assert torch.equal(actual, without_cache(model, input_ids)[:, 7:])
    assert_same(model(inputs_embeds=embeddings).logits, model(input_ids).logits)


def test_generation_continues_from_its_own_cache(model):
    first = model.generate(tokens(1, 7), return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 3})
    seen = {"attention_mask": torch.ones_like(first.sequences), "past_key_values": first.past_key_values}
    second = model.generate(first.sequences, **seen, **GREEDY | {"max_new_tokens": 5})
    assert torch.equal(second, without_cache(model, tokens(1, 7)))


def test_generation_returns_scores_states_and_attentions(model):
    model.set_attn_implementation("eager")
    wanted = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}
    output = model.generate(tokens(2, 7), return_dict_in_generate=True, **wanted, **GREEDY)
    assert len(output.scores) == len(output.logits) == 8
    assert [step[0].shape[2:] for step in output.attentions[:3]] == [(7, 7), (1, 8), (1, 9)]
    assert output.hidden_states[0][0].shape == (2, 7, 32) and len(output.hidden_states[0]) == 4


def test_a_four_dimensional_mask_is_obeyed(model):
    """Three continuations of a shared prefix in one row see the prefix and themselves only."""
    prefix, ends = tokens(1, 3), [tokens(1, 1, seed=seed) for seed in (1, 2, 3)]
    allowed = torch.eye(6, dtype=torch.bool)
    allowed[:, :3] |= torch.ones(6, 3, dtype=torch.bool).tril()
    mask = (~allowed[None, None]).double() * torch.finfo(torch.float64).min
    shared = model(
        torch.cat((prefix, *ends), dim=1), attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]])
    ).logits[:, 3:]
    alone = torch.cat([model(torch.cat((prefix, end), dim=1)).logits[:, -1:] for end in ends], dim=1)
    assert_same(shared, alone)


def test_the_text_generation_pipeline():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(58))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    model = tiny_model(dtype=torch.float32)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    generation = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for batch_size in (1, 2):
        texts = generator(["w1 w2 w3", "w9"], batch_size=batch_size, generation_config=generation)
        assert texts[0][0]["generated_text"].startswith("w1 w2 w3")
        assert texts[1][0]["generated_text"].startswith("w9")
    expected = tokenizer.decode(without_cache(model, torch.tensor([[words["w9"]]]), 4)[0])
    assert texts[1][0]["generated_text"].replace(" ", "") == expected.replace(" ", "")
