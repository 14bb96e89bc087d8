"""Converted models are the same function: logits, gradients, generation, ties, size."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.precision import in_own_precision
from rigpt_hf.conversion import TOLERANCES, certify, convert_model, export_model
from rigpt_hf.conversion.activations import RIGPT_ACTIVATIONS
from rigpt_hf.conversion.gpt2 import rigpt_config

from ..models import DTYPES, tokens
from ..tolerances import CONVERSION
from .sources import converted_pair, gpt2_config, over_sources, stock_model


def test_the_certificate_and_the_tests_ask_for_the_same():
    assert {dtype: TOLERANCES[dtype] for dtype in CONVERSION} == CONVERSION


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_sources()
def test_logits_are_the_same(name, dtype):
    certificate = certify(*converted_pair(name, dtype), tokens(2, 36))
    print(f"{name}: {certificate.relative_logit_error:.2e}")
    assert certificate.relative_logit_error <= CONVERSION[dtype]
    assert certificate.max_abs_logit > 0.1  # there was something to compare


@over_sources(["gpt2-untied", "gpt2-unscaled-layer-scaled", "llama-multi-query", "llama-tied-biases", "qwen2-tied"])
def test_gradients_agree(name):
    pair = converted_pair(name)
    weights = torch.randn(2, 9, pair[0].config.vocab_size, dtype=torch.float64)
    gradients = []
    for model in pair:
        embeddings = model.get_input_embeddings().weight
        inputs = embeddings.detach()[tokens(2, 9)].requires_grad_()
        with in_own_precision(model):
            by_inputs = torch.autograd.grad(
                (model(inputs_embeds=inputs, use_cache=False).logits * weights).sum(), inputs
            )
            by_table = torch.autograd.grad((model(tokens(2, 9), use_cache=False).logits * weights).sum(), embeddings)
        gradients.append((*by_inputs, *by_table))
    for expected, got in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=10 * CONVERSION[torch.float64] * expected.abs().max())


@pytest.mark.parametrize("name", ["gpt2", "qwen2-tied"])
def test_left_padded_cached_generation_gives_the_same_tokens(name):
    source, converted = converted_pair(name)
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :5] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = [model.generate(ids, attention_mask=mask, **settings) for model in (source, converted)]
    assert torch.equal(*generated)
    assert len({tuple(row.tolist()) for row in generated[0]}) == 3
    certificate = certify(source, converted, ids, mask)
    assert certificate.passed and certificate.inputs["tokens"] == int(mask.sum())


def test_embeddings_stay_tied(tmp_path):
    for name in ("gpt2", "llama-tied"):
        source, converted = converted_pair(name)
        converted.save_pretrained(tmp_path)
        for model in (converted, RiGPTForCausalLM.from_pretrained(tmp_path)):
            assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
            assert torch.equal(model.model.embed_tokens.weight, source.get_input_embeddings().weight)


def test_the_result_shares_nothing_with_the_source():
    source = stock_model("gpt2")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    converted = convert_model(source)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_the_overhead_at_124m_is_below_one_percent():
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0)
    with torch.device("meta"):
        stock = GPT2LMHeadModel(config).num_parameters()
        converted = RiGPTForCausalLM(rigpt_config(config)).num_parameters()
    assert stock == 124_439_808
    print(f"overhead {converted / stock - 1:.4%}")
    assert 0 < converted - stock <= 0.01 * stock


def test_a_generation_config_that_could_not_be_made_anew_comes_along(tmp_path):
    """The library saves what it has loaded, though it would refuse to make it."""
    odd = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    stock_model("gpt2", torch.float32).save_pretrained(tmp_path / "stock")
    path = tmp_path / "stock" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    source = GPT2LMHeadModel.from_pretrained(tmp_path / "stock")
    source.save_pretrained(tmp_path / "again")
    for name, model in (("rigpt", convert_model(source)), ("back", export_model(convert_model(source)))):
        model.save_pretrained(tmp_path / name)
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {name: saved[name] for name in odd} == odd
        assert model.generation_config is not source.generation_config


def test_activations_of_other_names_are_the_same_functions():
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    apart = {name: (ACT2FN[name](x) - ACT2FN[ours](x)).abs().max() for name, ours in RIGPT_ACTIVATIONS.items()}
    assert {"gelu_fast", "gelu_python", "gelu_accurate", "gelu_python_tanh"} < apart.keys()
    assert max(apart.values()) <= CONVERSION[torch.float64]
    assert (ACT2FN["quick_gelu"](x) - ACT2FN["gelu"](x)).abs().max() > 1e-3


def test_the_finest_dtype_of_the_weights_is_that_of_the_result():
    for coarse in ("embed_tokens", "layers.0.mlp.up_proj"):
        source = stock_model("llama", torch.float32)
        module = source.model.get_submodule(coarse)
        module.to(torch.bfloat16)
        converted = convert_model(source)
        assert converted.dtype == torch.float32
        with torch.no_grad():
            source.float()
        assert certify(source, converted).passed
    assert convert_model(stock_model("llama", torch.bfloat16)).dtype == torch.bfloat16


def test_mode_generation_config_and_token_ids_come_along():
    source = stock_model("llama").train()
    source.generation_config.temperature = 0.7
    source.generation_config.do_sample = True
    converted = convert_model(source)
    assert converted.training
    assert converted.generation_config.temperature == 0.7
    assert (converted.config.bos_token_id, converted.config.eos_token_id) == (1, 2)


def test_coordinate_dropout_is_changed_and_said(monkeypatch):
    said = []
    monkeypatch.setattr("rigpt_hf.conversion.dropout.logger.warning", said.append)
    rigpt_config(gpt2_config())
    assert not said, "there is nothing to say without dropout"
    for choice, probabilities in (("vector", (0.1, 0.2)), ("none", (0.0, 0.0))):
        config = rigpt_config(gpt2_config(resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3), choice)
        assert (config.residual_dropout, config.embedding_dropout) == probabilities
        assert config.attention_dropout == 0.3
        assert "`resid_pdrop=0.1`" in said[-1] and "`embd_pdrop=0.2`" in said[-1]
    assert len(said) == 2


def test_the_cast_to_sixteen_bits_comes_last():
    source = stock_model("gpt2", torch.float32)
    exact = convert_model(source, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        converted = convert_model(source, dtype=dtype)
        assert converted.dtype is dtype
        for (name, got), (_, expected) in zip(converted.named_parameters(), exact.named_parameters(), strict=True):
            assert torch.equal(got, expected.to(dtype)), name
        assert certify(source, converted, tokens(2, 20)).passed
