"""Saving and loading: tied weights, missing weights, devices, dtypes, resized embeddings."""

import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, RiGPTForSequenceClassification, RiGPTModel
from tests.model.agreement import assert_different, assert_same
from tests.models import ALL, COVER, EACH, OPTIONS, over, randomise_, tiny_config, tiny_model, tokens


CLASSES = {
    RiGPTModel: AutoModel,
    RiGPTForCausalLM: AutoModelForCausalLM,
    RiGPTForSequenceClassification: AutoModelForSequenceClassification,
}


@over(EACH, [*COVER, *OPTIONS])
@pytest.mark.by_default(4)
def test_a_saved_model_is_the_same_model(option, tmp_path):
    model = tiny_model(**ALL[option])
    expected = model(tokens(2, 7)).logits
    for _ in range(2):  # saving what was loaded must work as well
        model.save_pretrained(tmp_path)
        loaded, info = RiGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.is_contiguous(), name
            assert a.requires_grad == b.requires_grad, name
        model = loaded
    assert_same(model.eval()(tokens(2, 7)).logits, expected)


def test_auto_classes_know_the_model(tmp_path):
    for model_class, auto_class in CLASSES.items():
        model = randomise_(model_class(tiny_config(num_labels=3)), 0).eval()
        model.save_pretrained(tmp_path)
        assert isinstance(AutoConfig.from_pretrained(tmp_path), RiGPTConfig)
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is model_class
        assert_same(loaded(tokens(2, 7))[0], model(tokens(2, 7))[0])


over_heads = pytest.mark.parametrize(
    ("tied", "projected"), [(True, None), (True, 24), (False, None), (False, 24)], ids=str
)


@over_heads
def test_embeddings_stay_tied_or_untied(tied, projected, tmp_path):
    model = tiny_model(tie_word_embeddings=tied, embedding_size=projected)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != tied
    for loaded in (model, RiGPTForCausalLM.from_pretrained(tmp_path)):
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_model_without_its_tied_keys_would_be_noticed(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(RiGPTForCausalLM, "_tied_weights_keys", {})
    loaded, info = RiGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "lm_head.weight" in info["missing_keys"]
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_the_base_model_is_read_from_and_into_the_heads(tmp_path):
    model = tiny_model(embedding_size=24)
    model.save_pretrained(tmp_path / "head")
    base = RiGPTModel.from_pretrained(tmp_path / "head").eval()
    assert_same(base(tokens(2, 7)).last_hidden_state, model.model(tokens(2, 7)).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    _, info = RiGPTForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@over(EACH, [*COVER, *OPTIONS])
@pytest.mark.by_default(3)
def test_weights_that_a_checkpoint_lacks_and_a_model_made_on_the_meta_device_get_their_initial_law(option):
    torch.manual_seed(0)
    options = ALL[option] | {"num_labels": 40}  # with fewer, the classifier has too few weights to know their law
    models = [RiGPTForCausalLM.from_pretrained(None, config=tiny_config(**options), state_dict={})]
    for model_class in CLASSES:
        with torch.device("meta"):
            model = model_class(tiny_config(**options))
        assert all(tensor.is_meta for tensor in model.parameters())
        models.append(model.to_empty(device="cpu"))
        model.init_weights()
    references = [model_class(tiny_config(**options)) for model_class in (RiGPTForCausalLM, *CLASSES)]
    for model, reference in zip(models, references, strict=True):
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        for (name, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            spread = b.std(correction=0)
            assert a.isfinite().all() and abs(a.std(correction=0) - spread) <= 0.4 * spread + 1e-8, name
            assert abs(a.mean() - b.mean()) <= 0.4 * spread + 1e-8, name
        assert model.eval()(tokens(2, 7))[0].isfinite().all()


DEVICE_MAPS = {
    "cpu": {"device_map": "cpu"},
    "auto": {"device_map": "auto"},
    "dict": {"device_map": {"": "cpu"}},
    "disk": {"device_map": {}},
    "auto-with-little-memory": {"device_map": "auto", "max_memory": {"cpu": 120_000}},
}
ON_DISK = {"model.embed_positions", "model.layers.1", "model.layers.2", "model.project_out"}


@pytest.mark.parametrize("option", ["learned-projected", "distance"])
@pytest.mark.parametrize("where", DEVICE_MAPS)
@pytest.mark.by_default(5)
def test_device_maps(where, option, tmp_path):
    model = tiny_model(dtype=torch.float32, **OPTIONS[option] | {"embedding_size": 24})
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    arguments = DEVICE_MAPS[where]
    if where == "disk":
        parts = [
            name for name, _ in model.named_modules() if re.fullmatch(r"lm_head|model\.(layers\.\d|[^l.]\w*)", name)
        ]
        arguments = {"device_map": {name: "disk" if name in ON_DISK else "cpu" for name in parts}}
    loaded = RiGPTForCausalLM.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "offload", **arguments)
    assert_same(loaded(tokens(2, 7)).logits, model(tokens(2, 7)).logits)
    if "disk" in where or "little" in where:
        assert "disk" in loaded.hf_device_map.values()
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(loaded.generate(tokens(1, 7), **greedy), model.generate(tokens(1, 7), **greedy))


def test_dtypes(tmp_path):
    tiny_model(dtype=torch.float32, embedding_size=24, attention_score="squared_distance").save_pretrained(tmp_path)
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for dtype, expected in (
        ("float16", half),
        ("bfloat16", brain),
        ("float32", single),
        (brain, brain),
        ("auto", single),
    ):
        model = RiGPTForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model(tokens(2, 7)).logits.dtype == expected


def test_learned_frequencies_are_never_loaded_in_16_bits(tmp_path):
    tiny_model(dtype=torch.float32, rotary_learned_frequencies=True).save_pretrained(tmp_path)
    model = RiGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("rotary_frequencies") else torch.bfloat16), name
    assert model(tokens(2, 7)).logits.dtype == torch.bfloat16


@over_heads
def test_the_vocabulary_can_be_resized(tied, projected, tmp_path):
    model = tiny_model(tie_word_embeddings=tied, embedding_size=projected)
    before = model(tokens(2, 7)).logits
    for size in (70, 61, 50):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size
        assert model.get_input_embeddings().weight.shape == (size, projected or 32)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        input_ids = tokens(2, 7).clamp_max(size - 1)
        logits = model(input_ids, labels=input_ids).logits
        assert logits.shape == (2, 7, size)
        if size >= 61:
            assert_same(logits[..., :61], before)
    head = model.lm_head.weight.clone()
    model.post_init()
    assert torch.equal(model.lm_head.weight, head), "made anew"
    model.save_pretrained(tmp_path)
    loaded = RiGPTForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(loaded(input_ids).logits, model(input_ids).logits)


def test_wrong_sizes_are_refused(tmp_path):
    RiGPTForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=42)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
    assert model(tokens(2, 7)).logits.shape == (2, 42)


def test_embeddings_can_be_replaced():
    model = tiny_model()
    new = torch.nn.Embedding(61, 32, dtype=torch.float64)
    before = model(tokens(2, 7)).logits
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new and model.get_output_embeddings() is model.lm_head
    assert_different(model(tokens(2, 7)).logits, before)
