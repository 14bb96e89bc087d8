"""Every architecture that converts: one function, in every frame, tied as before, from memory and from a folder."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from rigpt_hf.checkpoints.precision import in_own_precision
from rigpt_hf.checkpoints.weights import Weights
from rigpt_hf.configuration_rigpt import rotary_frequencies
from rigpt_hf.conversion import Certificate, certify, convert_checkpoint, convert_model
from rigpt_hf.conversion.families import ARCHITECTURES, architecture_of
from rigpt_hf.conversion.plan import make_plan
from rigpt_hf.conversion.stock_rotation import rotate_stock
from rigpt_hf.symmetry import GaugeTransformation, gauge_error, haar

from ..models import DTYPES, tokens
from ..tolerances import CONVERSION, SYMMETRY
from .families import FAMILIES, YARN, architecture, converted_family, family_model


over_families = pytest.mark.parametrize("name", FAMILIES)
# One variant of every architecture, and the others where tests marked `full` run.
FIRST = {architecture(name): name for name in reversed(FAMILIES)}
over_architectures = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.full) for name in FAMILIES]
)
# A class of each way to store weights and to compute, where others of its kind would show nothing else.
KINDS = ("gpt2", "opt", "gpt_neo", "llama", "ministral3", "gemma", "gemma3_text", "olmo2", "cohere2", "phi", "phi3")
KINDS += ("gpt_neox", "falcon", "bloom", "mixtral", "gpt_oss", "nanochat")
over_kinds = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in KINDS)) for name in FAMILIES]
)


def test_every_architecture_has_a_source():
    assert {architecture(name) for name in FAMILIES} == set(ARCHITECTURES)
    assert set(KINDS) <= set(FAMILIES)


@over_architectures
def test_nothing_of_a_source_does_nothing(name):
    """No gain is 1, no bias 0, and no two layers are alike."""
    state = family_model(name).state_dict()
    assert all(tensor.std() > 0.05 and (tensor - tensor.round()).abs().mean() > 0.05 for tensor in state.values())
    first = next(key for key in state if ".1." in key)
    assert not torch.equal(state[first], state[first.replace(".1.", ".0.")])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_families
@pytest.mark.by_default(47)
def test_a_family_is_the_same_function(name, dtype):
    certificate = certify(*converted_family(name, dtype), tokens(2, 36))
    print(f"{name}: {certificate.relative_logit_error:.1e}")
    assert certificate.relative_logit_error <= CONVERSION[dtype]
    assert certificate.max_abs_logit > 0.1


@over_kinds
def test_all_frames_act_on_a_converted_family(name):
    converted = converted_family(name)[1]
    g = GaugeTransformation.random(converted.config, torch.Generator().manual_seed(1), frames="all")
    error = gauge_error(converted, g, tokens(2, 36))
    print(f"{name}: {error:.1e}")
    assert error <= SYMMETRY[torch.float64]
    turned = dict(g(converted).named_parameters())
    still = [key for key, old in converted.named_parameters() if old.any() and torch.equal(old, turned[key])]
    still = [key for key in still if not key.endswith("_output_norm.weight")]  # whose gains have a frame of their own
    assert set(still) <= {"model.embed_tokens.weight", "lm_head.weight"}


@over_kinds
def test_a_stock_model_turns_but_for_its_norms(name):
    source, size = converted_family(name)[0], converted_family(name)[1].config.hidden_size
    expected = source(tokens(2, 36)).logits
    generator = torch.Generator().manual_seed(0)
    # Norms without gains that do not centre turn too, as far as float32 goes, in which NanoChat's compute.
    turned = (0, SYMMETRY[torch.float32]) if architecture(name) == "nanochat" else (0.1, float("inf"))
    for rotation, (least, most) in ((torch.eye(size), (0, 0)), (haar(size, generator), turned)):
        error = (rotate_stock(source, rotation)(tokens(2, 36)).logits - expected).abs().max() / expected.abs().max()
        assert least <= error <= most


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-tied", "gpt_oss"])
def test_a_stock_model_with_experts_and_without_gains_turns(name):
    source = family_model(name)
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if key.endswith("norm.weight"):
                parameter.fill_(1.0)
    turned = rotate_stock(source, haar(converted_family(name)[1].config.hidden_size))
    assert certify(source, turned, tokens(2, 36)).relative_logit_error <= SYMMETRY[torch.float64]
    moved = [key for key, new in turned.named_parameters() if not torch.equal(new, source.get_parameter(key))]
    assert sum("experts." in key for key in moved) >= 6


@over_architectures
def test_tied_stays_tied(name):
    source, converted = converted_family(name)
    tied = source.config.tie_word_embeddings
    assert (converted.lm_head.weight.data_ptr() == converted.model.embed_tokens.weight.data_ptr()) is tied
    if tied:
        embeddings = source.get_input_embeddings().weight
        assert torch.equal(converted.model.embed_tokens.weight[:, : embeddings.shape[1]], embeddings)


@over_kinds
@pytest.mark.by_default(8)
def test_generation_with_a_cache_is_generation_without(name):
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :5] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    source, converted = converted_family(name)
    with in_own_precision(source):  # or eager attention of padding is not a number
        expected = source.generate(ids, attention_mask=mask, use_cache=True, **settings)
    cached, without = (
        converted.generate(ids, attention_mask=mask, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(cached, expected) and torch.equal(without, expected)
    assert len({tuple(row.tolist()) for row in expected}) == 3


@over_kinds
@pytest.mark.by_default(4)
def test_a_folder_becomes_what_its_model_becomes(name, tmp_path):
    dtype = torch.bfloat16 if architecture(name) == "gemma" else torch.float32  # which rounds its constant
    source = family_model(name, dtype)
    source.save_pretrained(tmp_path / "source", max_shard_size=20_000)
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    converted, expected = type(convert_model(source)).from_pretrained(tmp_path / "out"), convert_model(source)
    assert converted.dtype is dtype
    for key, tensor in converted.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key


@pytest.mark.parametrize("name", ["llama", "gemma", "ernie4_5", "olmo", "nanochat", "cohere"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_certificate_in_float64_sees_past_what_the_library_rounds(name, backend):
    """Its norms, a rotation and eager attention compute in float32; a model of float32 is left as it is."""
    source, converted = family_model(name), converted_family(name)[1]
    source.set_attn_implementation(backend)
    assert certify(source, converted, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    for dtype, least, most in ((torch.float64, 1e-9, 1e-5), (torch.float32, 0, 0)):
        source.to(dtype)
        plain = source(tokens(2, 36)).logits
        with in_own_precision(source):
            error = (source(tokens(2, 36)).logits - plain).abs().max() / plain.abs().max()
        assert least <= error <= most


@pytest.mark.parametrize("made", [torch.float32, torch.float64], ids=str)
def test_a_certificate_in_float64_sees_past_a_table_of_angles(made):
    """Which GPT-J keeps, as it was rounded when the model was made; afterwards it is what it was."""
    source = family_model("gptj", made).to(torch.float64)
    converted, tables = convert_model(source), [layer.attn.embed_positions for layer in source.transformer.h]
    assert certify(source, converted, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    assert all(layer.attn.embed_positions is table for layer, table in zip(source.transformer.h, tables, strict=True))
    plain = source(tokens(2, 36)).logits
    error = (converted(tokens(2, 36)).logits - plain).abs().max() / plain.abs().max()
    print(f"{made}: {error:.1e}")
    assert 1e-10 < error < 1e-6


def test_a_constant_is_the_one_that_a_model_in_memory_has():
    """Gemma keeps `sqrt(d)` as it was rounded when the model was made, whatever dtype it has now."""
    for name in ("gemma", "gemma-untied"):
        for made, now, apart in ((torch.float32, torch.float64, 1e-9), (torch.bfloat16, torch.float32, 1e-4)):
            source = family_model(name, made).to(now)
            assert certify(source, convert_model(source), tokens(2, 36)).relative_logit_error <= CONVERSION[now]
            # The same weights in a file know nothing of that.
            entry, state = architecture_of(source.config), source.state_dict()
            plan = make_plan(entry, source.config, Weights(state))
            as_stored = convert_model(source)
            missing, odd = as_stored.load_state_dict(
                {each.name: each.make(now) for each in plan.entries}, strict=False
            )
            assert not odd and set(missing) <= {"lm_head.weight"}  # which is tied
            error = certify(source, as_stored, tokens(2, 36)).relative_logit_error
            print(f"{name}: {error:.1e}")
            assert error > apart


@pytest.mark.parametrize("name", ["gptj", "gptj-tied", "phi", "phi-tied"])
def test_the_bias_of_the_head_is_a_dimension_of_its_own(name):
    """It never enters the stream, and the stream never reaches it."""
    source, converted = converted_family(name)
    model, size = converted.model, converted.config.hidden_size
    assert converted.config.embedding_size == size + 1
    assert not model.project_in.weight[:, size].any() and not model.project_out.weight[size].any()
    assert model.project_out.bias[size] == 1 and torch.equal(converted.lm_head.weight[:, size], source.lm_head.bias)
    assert source.config.tie_word_embeddings or not model.embed_tokens.weight[:, size].any()


def test_frequencies_that_are_not_truncated_stay_so():
    """As gpt-oss has them: the ends of the ramp between frequencies are no whole dimensions."""
    rope = YARN | {"original_max_position_embeddings": 32, "beta_fast": 4.0}
    frequencies = {}
    for truncate in (False, True):
        source = family_model("gpt_oss", rope_parameters=rope | {"truncate": truncate})
        found, scaling = rotary_frequencies(convert_model(source).config)
        assert torch.equal(found, source.model.rotary_emb.inv_freq)
        assert scaling == source.model.rotary_emb.attention_scaling != 1
        frequencies[truncate] = found
    assert not torch.equal(frequencies[True], frequencies[False])


def test_a_bias_of_the_head_that_is_missing_is_named():
    state = {name: tensor for name, tensor in family_model("gptj").state_dict().items() if name != "lm_head.bias"}
    with pytest.raises(ValueError, match="`lm_head.bias` is missing from the source.*match GPT-J"):
        make_plan(ARCHITECTURES["gptj"], family_model("gptj").config, Weights(state))


def test_a_head_under_its_former_name():
    source = family_model("gpt_neox")
    state = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in source.state_dict().items()}
    assert "embed_out.weight" in state
    plan = make_plan(ARCHITECTURES["gpt_neox"], source.config, Weights(state))
    made = {each.name: each.make(torch.float64) for each in plan.entries}
    assert torch.equal(made["lm_head.weight"], source.lm_head.weight)


@pytest.mark.parametrize("size, turned", [(44, 30), (47, 6), (49, 2), (64, 64)])
def test_so_many_dimensions_turn_as_the_configuration_says(size, turned):
    """Also where a part of the size of a head is no whole number of them by rounding."""
    assert size == turned or int(size * (turned / size)) < turned
    config = CONFIG_MAPPING["gptj"](n_embd=2 * size, n_head=2, rotary_dim=turned)
    assert 2 * len(rotary_frequencies(ARCHITECTURES["gptj"].result(config))[0]) == turned
