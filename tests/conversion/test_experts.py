"""Experts of checkpoints: both forms in which they are stored, what is refused, and routes in certificates."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from rigpt_hf.checkpoints.certificate import ROUTERS, Certificate, CertificateError, certify
from rigpt_hf.checkpoints.routes import Routing, differing_routes, on_routes, recorded_routes, routers_of
from rigpt_hf.conversion import convert_checkpoint, convert_model
from rigpt_hf.conversion.families import architecture_of
from rigpt_hf.symmetry import GaugeTransformation
from tests.model.agreement import assert_different, assert_same
from tests.models import tokens
from tests.tolerances import CONVERSION

from .families import FAMILIES, architecture, converted_family, family_model
from .test_families import FIRST


def turned(model, frames="all"):
    return GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), frames)(model)


@pytest.mark.parametrize("single", [True, False], ids=["one by one", "together"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe-tied"])
@pytest.mark.by_default(3)
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


MOE = {architecture(name): name for name in FAMILIES if "num_experts_per_tok" in FAMILIES[name]}


def test_every_family_with_a_router_is_looked_at():
    assert {name for name in FIRST if routers_of(family_model(FIRST[name]))} == set(MOE)


@pytest.mark.parametrize("name", MOE.values())
def test_in_16_bits_routes_differ_and_the_rest_is_judged_on_the_same(name):
    """As they do in the stock model itself, which is as far from what it is in float64."""
    source, ids = family_model(name), tokens(6, 64)
    rounded = deepcopy(source).to(torch.bfloat16)
    certificate = certify(rounded, convert_model(rounded), ids)
    stock, free = certify(source, rounded, ids), certificate.relative_logit_error
    print(
        f"{name}: stock {stock.relative_logit_error:.3f}, converted {free:.3f}, {certificate.routes_that_differ:.1%}"
    )
    error, routers = certificate.same_routes_error, certificate.same_routes_router_error
    print(f"    on the same routes {error:.3f}, routers {routers:.4f}")
    assert certificate.passed_on_same_routes and 0 < certificate.routes_that_differ < 0.1
    assert certificate.check() is certificate and Certificate.from_dict(certificate.to_dict()) == certificate
    assert free > certificate.tolerance > certificate.same_routes_error
    assert "equal up to rounding and the routes that it turns" in str(certificate)
    assert f"relative {error:.3e}, routers {routers:.3e}" in str(certificate)


MANY = {"num_experts": 64, "num_experts_per_tok": 4}
ONE = {"num_experts": 8, "num_experts_per_tok": 1}


def held(certificate):
    return certificate.same_routes_error, certificate.same_routes_router_error


def options_of(name, options):
    """The options, by the name that the family's class has for the number of experts."""
    names = {"num_experts": "num_local_experts"} if architecture(name) in ("mixtral", "gpt_oss") else {}
    return {names.get(key, key): value for key, value in options.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("name", MOE.values())
@pytest.mark.by_default(3)
def test_experts_that_changed_places_few_tokens_or_none_tell(name, dtype):
    """Of 64 experts, many have no token; turned by themselves, and with all other frames."""
    model, ids = convert_model(family_model(name, **options_of(name, MANY)).to(dtype)), tokens(2, 64)
    for frames in (("experts",), "all"):
        certificate = certify(model, turned(model, frames), ids)
        part, error, routers = (certificate.routes_that_differ, *held(certificate))
        print(f"{name}, {dtype}, {frames}: {certificate.relative_logit_error:.3f}, {part:.1%}, {error}, {routers}")
        assert certificate.passed
    assert certificate.routes_that_differ > 0
    # Routers that alone have them elsewhere are wrong.
    other = deepcopy(model)
    with torch.no_grad():
        for router in routers_of(other):
            for parameter in router.parameters():
                parameter.copy_(parameter.roll(1, 0))
    assert not certify(model, other, ids).passed


@pytest.mark.parametrize("name", MOE.values())
def test_one_expert_per_token_of_a_router_that_is_right_or_off_by_5_percent(name):
    """One expert's weight, if it is divided by itself, says nothing of its router."""
    source, ids = family_model(name, **options_of(name, ONE)).to(torch.bfloat16), tokens(2, 64)
    converted = convert_model(source)
    right = certify(source, converted, ids)
    with torch.no_grad():
        for place, router in enumerate(routers_of(converted)):
            for parameter in router.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
                parameter += (0.05 * noise * parameter.float().std()).to(parameter.dtype)
    wrong = certify(source, converted, ids)
    print(f"{name}: routers {right.same_routes_router_error}, off by 5 % {wrong.same_routes_router_error}")
    assert right.passed and not wrong.passed
    assert wrong.same_routes_router_error > ROUTERS * wrong.tolerance
    if right.same_routes_router_error is not None:
        assert right.same_routes_router_error < 0.6 * wrong.same_routes_router_error


def test_a_number_that_all_logits_share_hides_no_wrong_router():
    source, ids = family_model("gpt_oss", num_experts_per_tok=1).to(torch.bfloat16), tokens(2, 64)
    with torch.no_grad():
        for router in routers_of(source):
            router.bias += 8
    converted = convert_model(source)
    assert certify(source, converted, ids).passed
    with torch.no_grad():
        for router in routers_of(converted):
            router.weight += 0.1 * router.weight.roll(1, -1)
            router.bias += 8
    certificate = certify(source, converted, ids)
    assert certificate.same_routes_error < certificate.tolerance and not certificate.passed


def test_the_rule_is_only_for_routes_that_rounding_turns():
    result = converted_family("mixtral")[1]
    certificate = certify(result, turned(result))
    assert certificate.routes_that_differ == 0 and "0.000% differ" in str(certificate)
    assert certificate.same_routes_error is None and not certificate.passed_on_same_routes


class TestNegativeControls:
    """A wrong conversion is refused in 16 bits, whatever routes have turned."""

    @staticmethod
    def refused(name, change, part) -> None:
        source, ids = family_model(name).to(torch.bfloat16), tokens(2, 64)
        converted = convert_model(source)
        assert certify(source, converted, ids).passed
        with torch.no_grad():
            for layer in converted.model.layers:
                parameter = layer.get_parameter(part)
                parameter.copy_(change(parameter))
        certificate = certify(source, converted, ids)
        error, routers = certificate.same_routes_error, certificate.same_routes_router_error
        print(f"{name}, {part}: {certificate.relative_logit_error:.3f}, on the same routes {error:.3f}, {routers:.3f}")
        assert not certificate.passed and max(error, routers) > 1.5 * certificate.tolerance
        with pytest.raises(CertificateError, match="Of the routes .*% differ, and on the same routes `same_routes_er"):
            certificate.check()

    @pytest.mark.parametrize(
        "part",
        ["self_attn.q_proj.weight", "mlp.experts.up_proj.weight", "mlp.experts.down_proj.weight", "mlp.gate.weight"],
    )
    @pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss"])
    @pytest.mark.by_default(6)
    def test_a_wrong_weight(self, name, part):
        self.refused(name, lambda weight: weight.roll(1, -1), part)

    def test_a_wrong_router_that_sends_each_token_to_one_expert_of_weight_1(self):
        """Whose weights then say nothing of it; its logits do."""
        source, ids = family_model("mixtral", num_experts_per_tok=1).to(torch.bfloat16), tokens(2, 64)
        converted = convert_model(source)
        assert certify(source, converted, ids).passed
        with torch.no_grad():
            for layer in converted.model.layers:
                layer.mlp.gate.weight += 0.1 * layer.mlp.gate.weight.roll(1, -1)
        certificate = certify(source, converted, ids)
        assert certificate.same_routes_error < certificate.tolerance < certificate.same_routes_router_error
        assert not certificate.passed

    def test_weights_of_experts_that_are_not_divided_by_their_sum(self):
        source, ids = family_model("mixtral").to(torch.bfloat16), tokens(2, 64)
        converted = convert_model(source)
        for layer in converted.model.layers:
            layer.mlp.gate.normalised = False
        assert not certify(source, converted, ids).passed


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_a_model_on_its_own_routes_is_itself(normalised):
    model, ids = convert_model(family_model("qwen3_moe", norm_topk_prob=normalised)), tokens(2, 20)
    with recorded_routes(model) as routes:
        plain, kept = model(ids), torch.ones(40, dtype=torch.bool)
    with on_routes(model, routes, kept) as errors:
        assert_same(model(ids).logits, plain.logits)
    assert max(errors) <= CONVERSION[torch.float64]
    others = [Routing(one.logits, (one.chosen + 1) % one.logits.shape[-1]) for one in routes]
    with on_routes(model, others, kept) as errors:
        assert_different(model(ids).logits, plain.logits)
    assert errors[0] <= CONVERSION[torch.float64] and errors[1] > 0.1
    assert torch.equal(model(ids).logits, plain.logits)


def test_a_folder_in_16_bits_is_converted(tmp_path):
    family_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "result", input_ids=tokens(2, 64), progress=False)
    assert certificate.passed_on_same_routes and certificate.dtype == "bfloat16"
    stored = json.loads((tmp_path / "result" / "certificate.json").read_text())
    assert stored["passed"] and stored["same_routes_error"] == certificate.same_routes_error
    for name, value in (
        ("same_routes_error", 0.2),
        ("same_routes_router_error", 0.2),
        ("same_routes_router_error", 0.04),
    ):
        assert not Certificate.from_dict(stored | {name: value}).passed
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="are not those of two models"):
            Certificate.from_dict(stored | {"same_routes_error": value})
    del stored["same_routes_router_error"]
    with pytest.raises(ValueError, match="one of `same_routes_error` and `same_routes_router_error` is missing"):
        Certificate.from_dict(stored)


def test_models_without_experts_have_no_routes():
    source, result = converted_family("llama")
    certificate = certify(source, result)
    assert "routes_that_differ" not in certificate.to_dict() and "routes" not in str(certificate)
    assert Certificate.from_dict(certificate.to_dict()) == certificate


def test_experts_may_change_places_and_tokens_may_not():
    def routing(logits):
        return [Routing(one, one.topk(2, dim=-1).indices) for one in logits]

    # No token goes to the last two experts; one shift for each token tells nothing.
    logits, kept = torch.rand(3, 40, 7, dtype=torch.float64), torch.ones(40, dtype=torch.bool)
    logits[..., 5:] -= 2
    moved = logits[..., torch.randperm(7)] + 9 * torch.rand(3, 40, 1, dtype=torch.float64)
    assert differing_routes(routing(logits), routing(moved), kept) == 0
    other = routing(moved)
    other[1].chosen[7] = (other[1].chosen[7] + torch.tensor([1, 2])) % 7
    assert set(other[1].chosen[7].tolist()) != set(routing(moved)[1].chosen[7].tolist())
    assert differing_routes(routing(logits), other, kept) == 1 / 120
    kept[7] = False
    assert differing_routes(routing(logits), other, kept) == 0
    assert (
        differing_routes(routing(logits), routing(moved[:2]), kept) is None and differing_routes([], [], kept) is None
    )
