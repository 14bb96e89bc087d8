"""Verbs on checkpoints of any class: stock folders, GGUF files, files of other programs, and RiGPTs beside them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rigpt_hf.checkpoints.opened import open_model
from rigpt_hf.checkpoints.read import quiet_loading
from rigpt_hf.conversion import convert_model, export_model
from rigpt_hf.conversion.gguf import export_gguf
from rigpt_hf.symmetry import GaugeTransformation, gauge_distance
from tests.checkpoints.folders import save_tokenizer
from tests.cli.conftest import in_one_line
from tests.conversion.programs import nanogpt
from tests.conversion.sources import stock_model
from tests.models import noisy, tokens
from tests.tolerances import CONVERSION, DISTANCE


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tied Llama, a disguise of it that is untied and padded, a relative, GGUF, RiGPT and nanoGPT."""
    root = tmp_path_factory.mktemp("any")
    stock = stock_model("llama-tied", torch.float32)
    rigpt = convert_model(stock)
    generator = torch.Generator().manual_seed(3)
    turned = export_model(GaugeTransformation.random(rigpt.config, generator, "all")(rigpt), frame="stream")
    assert not turned.config.tie_word_embeddings
    with torch.no_grad():
        turned.resize_token_embeddings(64, mean_resizing=False)
    models = {"stock": stock, "rigpt": rigpt, "disguise": turned, "relative": noisy(stock, 0.05)}
    with quiet_loading():
        for name, model in models.items():
            model.save_pretrained(root / name)
        export_gguf(root / "rigpt", root / "gguf", dtype="float32", progress=False)
        for name in models:
            save_tokenizer(root / name)
    nanogpt(root / "nanogpt")
    (root / "text.txt").write_text("a b c a a b c " * 40)
    return root


def file_of(places):
    (path,) = (places / "gguf").glob("*.gguf")
    return path


def test_info_says_what_a_model_is_as_a_rigpt(done, places):
    for source, name in (
        (places / "stock", "LlamaForCausalLM"),
        (file_of(places), "LlamaForCausalLM"),
        (places / "nanogpt" / "ckpt.pt", "GPT2LMHeadModel"),
    ):
        out = done("info", source)
        assert f"parameters, as the RiGPT that this {name} is" in out and "stream" in out
        assert ("is GGUF, decoded to float32." in out) is (source.suffix == ".gguf")
    assert "as the RiGPT" not in done("info", places / "rigpt")
    assert done("info", places / "gguf", "--gguf-file", file_of(places).name).count("decoded") == 1


def test_charges_of_a_stock_model_are_those_of_its_conversion(done, places):
    of_stock, of_rigpt = (done("charges", places / name) for name in ("stock", "rigpt"))
    assert "layers.0.head_vo" in of_stock and of_stock == of_rigpt.replace("/rigpt ", "/stock ")
    measured = ("--measure", "--text", places / "text.txt", "--learning-rates", "0.01,0.005", "--time", "0.05")
    assert "order" in done("charges", places / "stock", *measured)


def test_a_stock_model_turns_and_keeps_its_class_if_asked(done, places, tmp_path):
    out = done("rotate", places / "stock", tmp_path / "a", "--frames", "all")
    assert "equal up to rounding" in out and f"{places / 'stock'}" in out
    assert open_model(tmp_path / "a").stock is None
    out = done("rotate", places / "stock", tmp_path / "b", "--as-source", "--save-transformation", tmp_path / "g")
    assert "equal up to rounding" in out and "(LlamaForCausalLM)" in out
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "b", places / "stock"))
    assert type(model) is LlamaForCausalLM
    name = "model.layers.1.self_attn.o_proj.weight"
    assert (model.state_dict()[name] - before.state_dict()[name]).norm() > 0.1 * before.state_dict()[name].norm()
    done("verify", places / "stock", tmp_path / "b")


@pytest.mark.full
def test_canonical_forms_of_two_classes_are_one_model(done, places, tmp_path):
    wide = ("--dtype", "float64")
    done("rotate", places / "stock", tmp_path / "turned", "--frames", "all", *wide)
    for source, name in ((places / "stock", "a"), (tmp_path / "turned", "b")):
        assert "smallest gap" in done("canonicalize", source, tmp_path / name, *wide)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert gauge_distance(first, second) <= DISTANCE[torch.float32]
    done("canonicalize", places / "stock", tmp_path / "c", "--as-source")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "c")) is LlamaForCausalLM
    done("verify", places / "stock", tmp_path / "c")


def test_diff_sees_through_class_ties_and_padding(rigpt, done, places, tmp_path):
    for first, second, said in (
        ("stock", "disguise", True),
        ("disguise", "rigpt", True),
        ("stock", "rigpt", False),
        ("stock", file_of(places), False),
    ):
        out = done("diff", places / first, places / second)
        assert "disguise" in out or "every weight is equal" in out
        assert ("Of the 64 tokens of" in out) is said
    code, out, _ = rigpt("diff", places / "stock", places / "relative")
    assert code == 1 and "relative" in out


@pytest.mark.full
def test_merging_stock_models_gives_their_class_back_if_asked(done, places, tmp_path):
    pair = places / "stock", places / "disguise"
    out = done("merge", *pair, tmp_path / "m", "--as-source", "--text", places / "text.txt", "--points", 3)
    assert "equal up to rounding" in out and "the merged model (RiGPTForCausalLM)" in out and "Barrier" in out
    merged, stock = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "m", pair[0]))
    assert type(merged) is LlamaForCausalLM and merged.config.vocab_size == 61
    with torch.no_grad():
        error = (merged(tokens(1, 9)).logits - stock(tokens(1, 9)).logits).abs().max() / stock(
            tokens(1, 9)
        ).logits.max()
    assert error < 100 * CONVERSION[torch.float32]
    facts = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert facts["sources"] == [str(path) for path in pair] and facts["loss"]["t"] == [0, 0.5, 1]
    done("merge", *pair, places / "relative", tmp_path / "n")
    found = open_model(tmp_path / "n")
    assert found.stock is None and found.config.vocab_size == 61 and not found.config.tie_word_embeddings
    assert (tmp_path / "n" / "tokenizer.json").is_file()


def test_what_has_no_other_class_is_said_before_anything_is_done(rigpt, places, tmp_path):
    for call in (
        ("rotate", places / "rigpt", tmp_path / "out"),
        ("canonicalize", places / "rigpt", tmp_path / "out"),
        ("merge", places / "rigpt", places / "stock", tmp_path / "out"),
    ):
        line = in_one_line(rigpt(*call, "--as-source"))
        assert "`--as-source` is for models of a stock class, got" in line and "which is a RiGPT" in line
    assert not list(tmp_path.iterdir())
