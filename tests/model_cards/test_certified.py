"""A certificate is repeated for the weights that it is of, and for no others, in every dtype."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import Certificate, certify, convert_model
from rigpt_hf.evaluation.models import evaluated
from rigpt_hf.model_cards.card import card_text
from rigpt_hf.model_cards.certified import certificate_of
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.checkpoint import transform_checkpoint


DTYPES = [torch.float32, torch.bfloat16]
QUESTION = "whether it is what it was made from: "


def fresh(seed: int, dtype: torch.dtype) -> GPT2LMHeadModel:
    """As weights are drawn for training: every one gives nearly the same loss on random tokens."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)).eval().to(dtype)


def save(folder: Path, dtype: torch.dtype, **options) -> tuple[RiGPTForCausalLM, Certificate]:
    """A converted model with its certificate."""
    source = fresh(0, dtype)
    model = convert_model(source)
    model.save_pretrained(folder)
    certificate = certify(source, model, **options)
    certificate.save(folder)
    return model, certificate


def doubt(folder: Path) -> str:
    """Nothing if the certificate holds."""
    certificate, why = certificate_of(folder, evaluated(folder))
    assert (certificate is None) == bool(why)
    return why.removeprefix(QUESTION)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_holds_for_its_own_weights_alone(dtype, tmp_path):
    model, certificate = save(tmp_path, dtype)
    assert certificate.passed and doubt(tmp_path) == ""
    other = convert_model(fresh(1, dtype))
    # The loss of other weights is the same in few digits, so it could tell them apart in many only.
    assert certify(model, other).loss_b == pytest.approx(certificate.loss_b, rel=5e-2)
    other.save_pretrained(tmp_path)
    assert doubt(tmp_path) == "its certificate is of other weights"


def test_the_least_change_of_one_weight_is_seen(tmp_path):
    for dtype in DTYPES:
        model, _ = save(tmp_path, dtype)
        with torch.no_grad():
            weight = model.model.layers[0].mlp.down_proj.weight
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf, dtype=dtype))
        model.save_pretrained(tmp_path)
        assert doubt(tmp_path) == "its certificate is of other weights"


def test_saved_again_in_other_shards_it_holds(tmp_path):
    save(tmp_path / "one", torch.bfloat16)
    RiGPTForCausalLM.from_pretrained(tmp_path / "one", dtype="auto").save_pretrained(
        tmp_path / "many", max_shard_size="2KB"
    )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    shutil.copy(tmp_path / "one/certificate.json", tmp_path / "many")
    assert doubt(tmp_path / "many") == ""


def test_turned_weights_have_a_certificate_of_their_own(tmp_path):
    model, _ = save(tmp_path / "one", torch.float32)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), compact=True)
    transform_checkpoint(tmp_path / "one", tmp_path / "turned", g, progress=False)
    assert doubt(tmp_path / "turned") == ""
    # They compute the same, but these are not the weights of which that was said.
    shutil.copy(tmp_path / "one/certificate.json", tmp_path / "turned")
    assert doubt(tmp_path / "turned") == "its certificate is of other weights"


def test_another_configuration_is_seen(tmp_path):
    save(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 10.0}))
    assert doubt(tmp_path) == "its weights no longer compute what its certificate says"


def test_on_given_inputs_a_configuration_cannot_be_checked(tmp_path):
    save(tmp_path, torch.float32, input_ids=torch.arange(20).view(2, 10))
    assert doubt(tmp_path) == "the inputs of its certificate, which were given, are not here"
    convert_model(fresh(1, torch.float32)).save_pretrained(tmp_path)
    assert doubt(tmp_path) == "its certificate is of other weights"


def test_the_largest_logit_must_be_that_of_the_certificate(tmp_path):
    _, certificate = save(tmp_path, torch.float32)
    replace(certificate, max_abs_logit=1.001 * certificate.max_abs_logit).save(tmp_path)
    assert doubt(tmp_path) == "its weights no longer compute what its certificate says"
    replace(certificate, weights_sha256="").save(tmp_path)
    assert doubt(tmp_path) == "its certificate names no weights"
    certificate.save(tmp_path)
    assert doubt(tmp_path) == ""


def test_what_did_not_pass_and_what_cannot_be_read(tmp_path):
    _, certificate = save(tmp_path, torch.float32)
    replace(certificate, max_abs_logit_error=certificate.max_abs_logit).save(tmp_path)
    assert doubt(tmp_path) == "its certificate did not pass"
    strange = {
        "loss_b": float("nan"),
        "loss_a": "1",
        "max_abs_logit": 0,
        "max_abs_logit_error": -1e-9,
        "dtype": "int8",
    }
    strange |= {"source": 5, "inputs": [], "versions": "2", "more": 1, "source_dtype": "__dict__", "tolerance": "1"}
    strange = [json.dumps(certificate.to_dict() | {name: value}) for name, value in strange.items()]
    odd = {"shape": [2], "tokens": None}, {"shape": ["a", "b"]}, {"shape": [-1, -64]}
    strange += [json.dumps(certificate.to_dict() | {"inputs": certificate.inputs | each}) for each in odd]
    for content in ("[]", "{}", "[" * 9, *strange):
        (tmp_path / "certificate.json").write_text(content)
        with pytest.raises(
            ValueError, match="`folder` must have a certificate that can be read or none, .* Remove it"
        ):
            print(content, doubt(tmp_path))
    (tmp_path / "certificate.json").unlink()
    assert certificate_of(tmp_path, evaluated(tmp_path)) == (None, "")


def test_a_certificate_says_no_more_than_its_numbers(tmp_path):
    """The tolerance is ours, and what follows from other numbers is computed from them."""
    _, certificate = save(tmp_path, torch.float32)
    stated = {"tolerance": 1e9, "relative_logit_error": 0.0, "loss_difference": 0.0, "passed": True}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate.to_dict() | stated))
    assert Certificate.load(tmp_path) == certificate and certificate.tolerance == 2e-5
    large = stated | {"max_abs_logit_error": 0.01 * certificate.max_abs_logit}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate.to_dict() | large))
    assert Certificate.load(tmp_path).relative_logit_error == pytest.approx(0.01)
    assert doubt(tmp_path) == "its certificate did not pass"
    (tmp_path / "certificate.json").unlink()  # which only its writer replaces
    # Wide bounds by a coarse dtype; a loss of the source that such a difference of logits cannot bring about; a size
    # that nobody would compute.
    for changes, why in (
        ({"dtype": "bfloat16"}, "its certificate contradicts itself"),
        ({"loss_a": 2 * certificate.loss_a}, "its certificate contradicts itself"),
        ({"inputs": certificate.inputs | {"shape": [10**6, 64], "tokens": 64 * 10**6}}, "the inputs of its certifi"),
    ):
        replace(certificate, **changes).save(tmp_path)
        assert doubt(tmp_path).startswith(why)


def test_the_tolerance_is_that_of_the_weights_that_are_there(tmp_path):
    """And neither that of the dtype that is stated of the source, nor of the one that a configuration names."""
    _, certificate = save(tmp_path, torch.float32)
    coarse = replace(certificate, source_dtype="bfloat16")
    coarse.save(tmp_path)
    assert Certificate.load(tmp_path).tolerance == 5e-2
    kept, why = certificate_of(tmp_path, evaluated(tmp_path))
    assert (kept, why) == (replace(coarse, tolerance=2e-5), "")
    four_percent = {"max_abs_logit_error": 0.04 * certificate.max_abs_logit}
    replace(coarse, **four_percent).save(tmp_path)
    assert Certificate.load(tmp_path).passed
    assert doubt(tmp_path) == (
        "its certificate passes only by the dtype that it states of the source, which cannot be checked"
    )
    replace(coarse, max_abs_logit_error=0.06 * certificate.max_abs_logit).save(tmp_path)
    assert doubt(tmp_path) == "its certificate did not pass"
    # As if the weights were of 16 bits, with the hash that they have once loaded so.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    loaded = evaluated(tmp_path).model
    assert loaded.dtype is torch.bfloat16
    forged = certify(loaded, loaded)
    replace(forged, max_abs_logit_error=0.04 * forged.max_abs_logit).save(tmp_path)
    assert doubt(tmp_path) == "its certificate contradicts itself"
    loaded.save_pretrained(tmp_path)
    assert doubt(tmp_path) == ""


def test_the_card_says_what_is_stated_and_what_was_checked(tmp_path, known_invariance):
    _, certificate = save(tmp_path, torch.float32)
    stated = {"source": "openai/better (<b>Model)", "tolerance": 1e9, "relative_logit_error": 1e-30}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate.to_dict() | stated))
    text = " ".join(card_text(tmp_path).split())
    assert "The certificate of these weights states that they compute the same function" in text
    assert "The source is stated to be openai/better (&#60;b&#62;Model)." in text
    assert f"| {certificate.max_abs_logit_error:.2e} | stated |" in text and "1e+09" not in text and "e-30" not in text
    assert f"| {certificate.relative_logit_error:.1e} | computed from what is stated |" in text
    assert "| 2e-05 | tolerance of this package |" in text
    assert f"| {certificate.loss_b:.6f} | measured once more |" in text


def test_the_card_repeats_it_or_says_why_not(tmp_path, known_invariance):
    _, certificate = save(tmp_path, torch.bfloat16)
    text = card_text(tmp_path)
    assert "same function" in text and f"{certificate.max_abs_logit_error:.2e}" in text
    # As it lies there when a converted model was trained on and saved to the same folder.
    convert_model(fresh(1, torch.bfloat16)).save_pretrained(tmp_path)
    text = card_text(tmp_path)
    assert "same function" not in text and f"{QUESTION}its certificate is of other weights" in text
