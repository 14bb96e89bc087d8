"""Experts of checkpoints: both forms in which they are stored, what is refused, and routes in certificates."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from rigpt_hf.checkpoints.certificate import Certificate, CertificateError, certify, differing_routes
from rigpt_hf.conversion import convert_checkpoint, convert_model
from rigpt_hf.conversion.families import architecture_of
from rigpt_hf.symmetry import GaugeTransformation
from tests.models import tokens
from tests.tolerances import CONVERSION

from .families import converted_family, family_model


def turned(model, frames="all"):
    return GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), frames)(model)


@pytest.mark.parametrize("single", [True, False], ids=["one by one", "together"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe-tied"])
def test_both_forms_in_which_checkpoints_store_experts(tmp_path, name, single):
    source, ids = family_model(name), tokens(2, 9)
    source.save_pretrained(tmp_path / "source", save_original_format=single)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    experts = [tensor for key, tensor in stored.items() if ".experts." in key]
    assert {tensor.dim() for tensor in experts} == {2 if single else 3}
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "result", progress=False)
    assert certificate.relative_logit_error <= CONVERSION[torch.float64]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert json.loads((tmp_path / "result" / "certificate.json").read_text())["routes_that_differ"] == 0
    for cached in (True, False):
        options = {
            "max_new_tokens": 9,
            "do_sample": False,
            "use_cache": cached,
            "attention_mask": torch.ones_like(ids),
        }
        assert torch.equal(result.generate(ids, **options), source.generate(ids, **options))


def test_a_missing_expert_is_named(tmp_path):
    family_model("mixtral").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    stored = load_file(path)
    del stored["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(stored, path, {"format": "pt"})
    message = r"`model.layers.1.mlp.experts.down_proj.weight` must be made of 5 experts .* got 4"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "result", progress=False)


def test_noise_of_coordinates_is_refused():
    config = MixtralConfig(router_jitter_noise=0.1)
    with pytest.raises(ValueError, match="`router_jitter_noise=0.1` cannot be converted"):
        architecture_of(config).result(config)


def test_another_way_to_weigh_experts_is_another_function():
    source, result = converted_family("mixtral")
    other = convert_model(source)
    assert certify(source, result).passed
    for layer in other.model.layers:
        layer.mlp.gate.normalised = False
    assert not certify(source, other).passed


def test_routers_logits_and_their_loss_are_the_librarys():
    source, result = converted_family("qwen2_moe-tied")
    ids, mask = tokens(2, 9), torch.ones(2, 9).long()
    mask[1, 6:] = 0
    outputs = [m(ids, attention_mask=mask, labels=ids, output_router_logits=True) for m in (source, result)]
    # The library's norms and losses are of float32 wherever they are not held to more.
    single = CONVERSION[torch.float32]
    assert float(outputs[1].loss) == pytest.approx(float(outputs[0].loss), rel=single)
    assert float(outputs[1].aux_loss) == pytest.approx(float(outputs[0].aux_loss), rel=single)
    assert len(outputs[1].router_logits) == len(outputs[0].router_logits) == 3
    for ours, theirs in zip(outputs[1].router_logits, outputs[0].router_logits, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= single


def test_in_16_bits_some_routes_differ_and_the_certificate_says_so():
    result = converted_family("mixtral")[1]
    exact, rounded = certify(result, turned(result)), certify(result, turned(result).to(torch.bfloat16))
    assert exact.routes_that_differ == 0 and "0.000% differ" in str(exact)
    assert 0 < rounded.routes_that_differ < 0.2 and f"{rounded.routes_that_differ:.3%} differ" in str(rounded)
    assert Certificate.from_dict(rounded.to_dict()) == rounded
    with pytest.raises(CertificateError, match="Of the routes of tokens to experts .*% differ"):
        rounded.check()


def test_models_without_experts_have_no_routes():
    source, result = converted_family("llama")
    certificate = certify(source, result)
    assert "routes_that_differ" not in certificate.to_dict() and "routes" not in str(certificate)
    assert Certificate.from_dict(certificate.to_dict()) == certificate


def test_experts_may_change_places_and_tokens_may_not():
    chosen = torch.rand(3, 2, 20, 5).topk(2, dim=-1).indices
    routes = torch.zeros(3, 2, 20, 5, dtype=torch.bool).scatter(-1, chosen, True)
    kept = torch.ones(2, 20, dtype=torch.bool)
    assert differing_routes(routes, routes[..., torch.randperm(5)], kept) == 0
    other = routes.clone()
    other[1, 0, 7] = other[1, 0, 7].roll(1)
    assert differing_routes(routes, other, kept) == 1 / 120
    # An expert that no token goes to is nowhere, and stays there.
    few = torch.cat((routes, torch.zeros(3, 2, 20, 1, dtype=torch.bool)), dim=-1)
    assert differing_routes(few, few, kept) == 0
    kept[0, 7] = False
    assert differing_routes(routes, other, kept) == 0
