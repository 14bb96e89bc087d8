"""The certificate sees what it must see: three classical mistakes, dead models, and its own round trip."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints import weights as weights_module
from rigpt_hf.checkpoints.certificate import CERTIFICATE_NAME, compare
from rigpt_hf.checkpoints.logits import random_input_ids, record_logits
from rigpt_hf.checkpoints.weights import weights_sha256
from rigpt_hf.conversion import Certificate, CertificateError, certify, convert_checkpoint, convert_model
from rigpt_hf.conversion import plan as plan_module
from rigpt_hf.conversion.families import ARCHITECTURES
from rigpt_hf.conversion.folds import fold_reader

from ..models import DTYPES, OPTIONS, tiny_model, tokens
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestNegativeControls:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2-tied"])
    def test_an_unfolded_gain_is_caught(self, name, dtype, monkeypatch):
        def forgetful(weight, gain, *others):
            return fold_reader(weight, None, *others)

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
        rules = tuple(replace(rule, scale=None) for rule in ARCHITECTURES["gpt2"].family.rules)
        with_family(monkeypatch, "gpt2", rules=rules)
        assert is_caught(stock_model("gpt2-layer-scaled", dtype))


def test_dead_models_certify_nothing():
    source = stock_model("gpt2", torch.float32)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    with pytest.raises(CertificateError, match="`a` must tell tokens apart .*the same logit for everything of GPT2LM"):
        certify(source, source, tokens(2, 10))
    with torch.no_grad():
        source.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(
        CertificateError, match="`a` must give finite logits .* of GPT2LM.* leave the range of float32"
    ):
        certify(source, source, tokens(2, 10))


def test_records_of_different_vocabularies_cannot_be_compared():
    ids = tokens(1, 5, vocab_size=40)
    records = [record_logits(stock_model("gpt2", **sizes), ids) for sizes in ({}, {"vocab_size": 40})]
    with pytest.raises(ValueError, match="logits of the same shape"):
        compare(*records, ids)


def test_tokens_that_one_model_has_alone_are_left_out():
    source, padded = stock_model("gpt2"), stock_model("gpt2")
    padded.resize_token_embeddings(source.config.vocab_size + 7, mean_resizing=False)
    certificate = certify(source, padded)
    assert certificate.passed
    assert certificate.inputs["checked"]["tokens of the vocabulary"][1] == source.config.vocab_size
    with torch.no_grad():
        padded.get_output_embeddings().weight[3] += 0.1
    assert not certify(source, padded).passed


def test_the_round_trip_through_json(tmp_path):
    source = stock_model("gpt2", torch.float32)
    certificate = certify(source, convert_model(source), seed=3)
    assert certificate.save(tmp_path) == tmp_path / CERTIFICATE_NAME
    assert Certificate.load(tmp_path) == certificate
    record = certificate.to_dict()
    assert record["passed"] is True
    assert set(certificate.versions) == {"python", "torch", "transformers", "rigpt_hf"}
    assert len(certificate.weights_sha256) == 64 and certificate.weights_sha256[:12] in str(certificate)
    assert certificate.inputs["seed"] == 3 and certificate.inputs["shape"] == [2, 40]
    del record["weights_sha256"]  # as earlier versions wrote it
    (tmp_path / CERTIFICATE_NAME).write_text(json.dumps(record))
    earlier = Certificate.load(tmp_path)
    assert earlier == replace(certificate, weights_sha256="") and "weights" not in str(earlier)


class TestTheHashOfWeights:
    def test_it_is_that_of_the_second_model(self):
        source = stock_model("gpt2", torch.float32)
        converted = convert_model(source)
        certificate = certify(source, converted)
        assert certificate.weights_sha256 == weights_sha256(converted) != weights_sha256(source)
        assert certificate.weights_sha256 != weights_sha256(convert_model(stock_model("gpt2", torch.float64)))

    def test_it_is_that_of_what_a_conversion_writes(self, tmp_path):
        """In one file and in shards, of a tied model and another."""
        for name, size in (("gpt2", None), ("llama", "2KB")):
            source = stock_model(name, torch.bfloat16)
            source.save_pretrained(tmp_path / name)
            certificate = convert_checkpoint(
                tmp_path / name, tmp_path / f"{name}-out", max_shard_size=size, progress=False
            )
            loaded = RiGPTForCausalLM.from_pretrained(tmp_path / f"{name}-out", dtype="auto")
            assert certificate.weights_sha256 == weights_sha256(loaded) == weights_sha256(convert_model(source))

    def test_name_shape_dtype_and_every_byte_count(self, monkeypatch):
        def of(**tensors: torch.Tensor) -> str:
            module = nn.Module()
            for name, tensor in tensors.items():
                module.register_buffer(name, tensor)
            return weights_sha256(module)

        values = torch.arange(6, dtype=torch.float32)
        last = values.clone()
        last[-1] += 1e-6
        others = [of(b=values), of(a=values.view(2, 3)), of(a=values.view(torch.int32)), of(a=values.double())]
        others += [of(a=last), of(a=values[:3], b=values[3:])]
        others += [of(a=values, b=torch.tensor(0.0)), of(a=values, b=torch.tensor(-0.0))]
        assert len({of(a=values), *others}) == 1 + len(others)
        # Order, layout in memory and how many bytes are taken at once do not.
        assert of(a=values, b=last) == of(b=last, a=values)
        whole = of(a=values.view(2, 3))
        assert of(a=values.view(2, 3).T.contiguous().T) == whole
        monkeypatch.setattr(weights_module, "CHUNK", 5)
        assert of(a=values.view(2, 3)) == whole

    @pytest.mark.parametrize("name, dtype", [("rotary-learned", torch.bfloat16), ("untied", torch.float32)], ids=str)
    def test_it_is_the_same_when_they_come_back(self, name, dtype, tmp_path):
        """Learned frequencies do so in float32, whatever the dtype of the others."""
        model = tiny_model(**OPTIONS[name]).to(dtype)
        model.save_pretrained(tmp_path)
        back = RiGPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert weights_sha256(back) == weights_sha256(model)
        # The same values in another dtype compute something else.
        assert weights_sha256(back.double()) != weights_sha256(model)
        if dtype is torch.bfloat16:
            assert weights_sha256(back.float()) != weights_sha256(model)

    def test_weights_that_are_elsewhere_have_none(self):
        assert weights_sha256(nn.Linear(2, 2, device="meta")) == ""


def test_the_table_and_the_loss():
    source = stock_model("gpt2")
    ids = tokens(2, 10)
    certificate = certify(source, convert_model(source), ids)
    text = str(certificate)
    assert "equal up to rounding" in text and "tolerance 1e-12" in text and "2 x 10 tokens, given" in text
    assert "GPT2LMHeadModel" in text and "RiGPTForCausalLM" in text
    assert "NOT EQUAL" in str(replace(certificate, relative_logit_error=1.0))
    long = str(replace(certificate, source="a folder/" * 12, versions={"word": "1", "longer": "2 " * 40})).splitlines()
    assert [line for line in long if len(line) > 80] == ["  source                   " + "a folder/" * 12]
    assert sum("2 2" in line for line in long) == 2
    with torch.no_grad():
        assert certificate.loss_a == pytest.approx(float(source(ids, labels=ids).loss), rel=1e-6)  # float32 inside
    assert abs(certificate.loss_difference) < 1e-12


class TestWhatIsChecked:
    def test_all_positions_of_a_table_up_to_a_bound(self):
        """Of two GPT-2 that differ behind the 64th position alone, and of two that differ in one token alone."""
        source = stock_model("gpt2", torch.float32, n_positions=256)
        for changed in ("wpe", "wte"):
            other = copy.deepcopy(source)
            assert certify(source, other).passed
            with torch.no_grad():
                table = getattr(other.transformer, changed).weight
                table[64 if changed == "wpe" else 7] *= 2
            assert not certify(source, other).passed

    def test_the_verdict_says_what_was_checked(self):
        source = stock_model("gpt2", torch.float32, n_positions=256)
        vocabulary = source.config.vocab_size
        everything = str(certify(source, source))
        assert "equal up to rounding\n" in everything and "1 x 256 tokens" in everything
        everything = " ".join(everything.split())
        assert f"256 of 256 positions, {vocabulary} of {vocabulary} tokens of the vocabulary" in everything
        part = str(certify(source, source, torch.tensor([[3, 4, 5, 3]])))
        assert "equal up to rounding, where checked\n" in part
        assert f"4 of 256 positions, 3 of {vocabulary} tokens of the vocabulary" in part

    def test_the_cost_is_bounded(self):
        assert random_input_ids(50_000, 8192).shape == (1, 1024) and random_input_ids(50_000, 40).shape == (2, 40)
        assert not random_input_ids(50, 64, seed=1).equal(random_input_ids(50, 64))
