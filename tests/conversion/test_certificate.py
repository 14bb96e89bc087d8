"""The certificate sees what it must see: three classical mistakes, dead models, and its own round trip."""

from dataclasses import replace

import pytest
import torch

from rigpt_hf.conversion import Certificate, CertificateError, certify, convert_model
from rigpt_hf.conversion import plan as plan_module
from rigpt_hf.conversion.certificate import CERTIFICATE_NAME
from rigpt_hf.conversion.families import ARCHITECTURES
from rigpt_hf.conversion.folds import fold_reader

from ..models import tokens
from .sources import stock_model


def is_caught(source) -> bool:
    certificate = certify(source, convert_model(source), tokens(2, 20))
    with pytest.raises(CertificateError, match="`relative_logit_error` must be at most"):
        certificate.check()
    print(f"{certificate.relative_logit_error:.2e}")
    return not certificate.passed and certificate.relative_logit_error > 1e-3


def with_family(monkeypatch, model_type: str, **changes):
    architecture = ARCHITECTURES[model_type]
    changed = replace(architecture, family=replace(architecture.family, **changes))
    monkeypatch.setitem(ARCHITECTURES, model_type, changed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
class TestNegativeControls:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2-tied"])
    def test_an_unfolded_gain_is_caught(self, name, dtype, monkeypatch):
        def forgetful(weight, gain, centred, scale, dtype):
            return fold_reader(weight, None, centred, scale, dtype)

        monkeypatch.setattr(plan_module, "fold_reader", forgetful)
        assert is_caught(stock_model(name, dtype))

    @pytest.mark.parametrize("name", ["llama", "llama-tied"])
    def test_a_centred_rms_norm_source_is_caught(self, name, dtype, monkeypatch):
        with_family(monkeypatch, "llama", centred=True)
        assert is_caught(stock_model(name, dtype))

    def test_an_uncentred_layer_norm_source_is_caught(self, dtype, monkeypatch):
        with_family(monkeypatch, "gpt2", centred=False)
        assert is_caught(stock_model("gpt2", dtype))

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_swapped_norms_are_caught(self, name, dtype, monkeypatch):
        family = ARCHITECTURES[name].family
        first, second = {"gpt2": ("ln_1", "ln_2"), "llama": ("input_layernorm", "post_attention_layernorm")}[name]

        def swap(norm):
            if norm is None:
                return None
            return norm.replace(first, "@").replace(second, first).replace("@", second)

        rules = tuple(replace(rule, norm=swap(rule.norm)) for rule in family.rules)
        assert rules != family.rules
        with_family(monkeypatch, name, rules=rules)
        assert is_caught(stock_model(name, dtype))

    def test_a_forgotten_query_scale_is_caught(self, dtype, monkeypatch):
        with_family(monkeypatch, "gpt2", query_scale=lambda config, layer: 1.0)
        assert is_caught(stock_model("gpt2-layer-scaled", dtype))


def test_dead_models_certify_nothing():
    source = stock_model("gpt2", torch.float32)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    with pytest.raises(CertificateError, match="the same logit for everything"):
        certify(source, source, tokens(2, 10))
    with torch.no_grad():
        source.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(CertificateError, match="not finite"):
        certify(source, source, tokens(2, 10))


def test_different_vocabularies_cannot_be_compared():
    with pytest.raises(ValueError, match="logits of the same shape"):
        small = stock_model("gpt2", vocab_size=40)
        certify(stock_model("gpt2"), small, tokens(1, 5, vocab_size=40))


def test_the_round_trip_through_json(tmp_path):
    source = stock_model("gpt2", torch.float32)
    certificate = certify(source, convert_model(source), seed=3)
    assert certificate.save(tmp_path) == tmp_path / CERTIFICATE_NAME
    assert Certificate.load(tmp_path) == certificate
    assert certificate.to_dict()["passed"] is True
    assert set(certificate.versions) == {"python", "torch", "transformers", "rigpt_hf"}
    assert certificate.inputs["seed"] == 3 and certificate.inputs["shape"] == [2, 40]


def test_the_table_says_what_was_found():
    source = stock_model("gpt2", torch.float32)
    certificate = certify(source, convert_model(source), tokens(2, 10))
    text = str(certificate)
    assert "equal up to rounding" in text and "tolerance 2e-05" in text and "2 x 10 tokens, given" in text
    assert "GPT2LMHeadModel" in text and "RiGPTForCausalLM" in text
    assert "NOT EQUAL" in str(replace(certificate, relative_logit_error=1.0))


def test_the_loss_is_the_library_s():
    source = stock_model("gpt2")
    ids = tokens(2, 12)
    certificate = certify(source, convert_model(source), ids)
    with torch.no_grad():
        assert certificate.loss_a == pytest.approx(float(source(ids, labels=ids).loss), rel=1e-6)  # float32 inside
    assert abs(certificate.loss_difference) < 1e-12
