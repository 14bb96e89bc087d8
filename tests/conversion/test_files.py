"""Checkpoints of nanoGPT and llama2.c: against what those programs compute."""

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.read import load_model
from rigpt_hf.conversion import convert_checkpoint, export_checkpoint
from rigpt_hf.conversion.files import read_file
from rigpt_hf.symmetry import GaugeTransformation, gauge_error

from ..checkpoints.folders import contents
from ..models import tokens
from ..tolerances import CONVERSION, SYMMETRY
from .programs import (
    FILES,
    HEADS,
    KV_HEADS,
    LENGTH,
    LLAMA2C,
    NANOGPT,
    NEURONS,
    SIZE,
    VOCAB,
    difference,
    llama2c_tensors,
    nanogpt,
    nanogpt_tensors,
    save,
    save_bin,
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.by_default(5)
def test_a_file_becomes_what_its_program_computes(name, tmp_path):
    path, right, wrong = FILES[name](tmp_path / "source")
    certificate = convert_checkpoint(path, tmp_path / "out", dtype=torch.float64, progress=False)
    assert certificate.passed
    model, ids = load_model(tmp_path / "out", RiGPTForCausalLM), tokens(2, 20)
    with torch.no_grad():
        logits = model(ids).logits
    off = difference(logits, right(ids))
    print(f"{name}: {off:.1e}, read wrongly {difference(logits, wrong(ids)):.1e}")
    assert off <= CONVERSION[torch.float64]
    assert difference(logits, wrong(ids)) > 1e-4
    assert model.config.tie_word_embeddings == ("untied" not in name)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(0), "all")
    assert gauge_error(model, g, ids) <= SYMMETRY[torch.float64]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(model.generate(ids[:, :6], use_cache=cached, **settings) for cached in (True, False)))
    assert contents(tmp_path) == {"source", "out"}


def test_a_file_comes_back_as_the_stock_class(tmp_path):
    for name, target in (("nanogpt-no-biases", "gpt2"), ("llama2c", "llama")):
        path, *_ = FILES[name](tmp_path / name)
        convert_checkpoint(path, tmp_path / f"{name}-rigpt", progress=False)
        certificate = export_checkpoint(tmp_path / f"{name}-rigpt", tmp_path / f"{name}-back", target=target)
        assert certificate.relative_logit_error <= CONVERSION[torch.float64]
        assert load_model(tmp_path / f"{name}-back").config.tie_word_embeddings


def test_the_end_of_a_text_is_known_where_the_tokenizer_is(tmp_path):
    for vocabulary, end in ((50304, 50256), (VOCAB, None)):
        tensors = nanogpt_tensors(True)
        tensors |= dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), torch.ones(vocabulary, 24))
        config = read_file(save(tmp_path, tensors, arguments(vocab_size=vocabulary))).config
        assert (config.bos_token_id, config.eos_token_id) == (end, end)


class Code:
    """What a pickle may hold besides tensors."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def arguments(**more) -> dict:
    return NANOGPT | {"bias": True} | more


def write(content: bytes):
    def make(folder: Path) -> Path:
        (folder / "file").write_bytes(content)
        return folder / "file"

    return make


def torch_file(content, **options):
    def make(folder: Path) -> Path:
        torch.save(content, folder / "file", **options)
        return folder / "file"

    return make


def safetensors(folder: Path) -> Path:
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def cut(folder: Path) -> Path:
    path = save_bin(folder, llama2c_tensors(True), True)
    path.write_bytes(path.read_bytes()[:-4])
    return path


def without(name: str, **more):
    def make(folder: Path) -> Path:
        tensors = {key: tensor for key, tensor in nanogpt_tensors(True).items() if key != name}
        return save(folder, tensors | more, arguments())

    return make


def with_(**more):
    return lambda folder: save(folder, nanogpt_tensors(True), arguments(**more))


def odd_tensor(change):
    name = "transformer.wpe.weight"
    return lambda folder: save(
        folder, nanogpt_tensors(True) | {name: change(nanogpt_tensors(True)[name])}, arguments()
    )


def one_bit(folder: Path) -> Path:
    path = save(folder, nanogpt_tensors(True), arguments())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


REFUSED = {
    "another-network": (with_(use_rmsnorm=True), "`use_rmsnorm`, which nanoGPT does not.*convert that"),
    "another-llama": (
        lambda folder: save(folder, llama2c_tensors(True), LLAMA2C | {"lora_modules": {}}),
        "`lora_modules`, which llama2.c does not",
    ),
    "an-older-nanogpt": (
        lambda folder: save(folder, nanogpt_tensors(True), NANOGPT),
        "`bias` is missing from it. Save it",
    ),
    "no-model": (torch_file({"weights": {"a": torch.ones(2)}}), "`model` and `model_args` are not in it"),
    "no-tensors": (torch_file({"model": {"a": 1}, "model_args": arguments()}), "`a` in it is no tensor"),
    "a-tensor": (torch_file(torch.ones(2)), "`model` and `model_args` are not in it"),
    "too-many-layers": (with_(n_layer=10**9), "says 1000000000 layers, and there are 41 tensors"),
    "odd-heads": (with_(n_head=5), "`n_embd` in its `model_args` must be divisible by `n_head`, got 24 and 5"),
    "a-word": (with_(n_embd="many"), "`n_embd` in its `model_args` must be a whole number of at least 1, got 'many'"),
    "no-heads": (with_(n_head=-4), "`n_head` in its `model_args` must be a whole number of at least 1, got -4"),
    "odd-dropout": (with_(dropout="a"), "`dropout` in its `model_args` must be a number from 0 to 1, got 'a'"),
    "no-length": (
        lambda folder: save(folder, llama2c_tensors(True), LLAMA2C | {"max_seq_len": 0}),
        "`max_seq_len` in its `model_args` must be a whole number of at least 1, got 0",
    ),
    "odd-keys": (
        lambda folder: save(folder, llama2c_tensors(True), LLAMA2C | {"n_kv_heads": 3}),
        "`n_heads` in its `model_args` must be divisible by `n_kv_heads`, got 4 and 3",
    ),
    "old-format": (
        torch_file({"model": nanogpt_tensors(True)}, _use_new_zipfile_serialization=False),
        "`torch.save` of torch 1.6 or later must have written it, and this.* save it again",
    ),
    "a-pickle": (write(pickle.dumps({"model": 1})), "this is a bare pickle or of the format before"),
    "sparse": (
        odd_tensor(lambda tensor: tensor.to_sparse()),
        "`transformer.wpe.weight` in it must be plain.*sparse_coo",
    ),
    "float8": (odd_tensor(lambda tensor: tensor.to(torch.float8_e4m3fn)), "must be plain numbers in.*float8_e4m3fn"),
    "no-numbers": (odd_tensor(lambda tensor: tensor.to("meta")), "must be plain numbers in.*on meta"),
    "whole-numbers": (odd_tensor(lambda tensor: tensor.to(torch.int32)), "must be plain numbers in.*int32"),
    "one-bit": (one_bit, "data/[0-9]+` in it is damaged: its checksum is another. Download"),
    "wrong-vocabulary": (
        with_(vocab_size=99),
        r"`transformer.wte.weight` has shape \[61, 24\] in it, and \[99, 24\] by",
    ),
    "missing": (without("transformer.h.1.ln_2.bias"), "`transformer.h.1.ln_2.bias` is missing"),
    "unknown": (without("", **{"transformer.h.0.gate": torch.ones(3)}), "`transformer.h.0.gate`: no place in RiGPT"),
    "later-version": (
        write(struct.pack("<7i", 0x616B3432, 2, 0, 0, 0, 0, 0)),
        "this is version 2. Export it with `--version 0`, or name the `.pt`",
    ),
    "cut": (cut, "it is none, or cut: of [0-9]+ bytes, where its first numbers say"),
    "text": (write(b"once upon a time there was a file"), "it is none, or cut|begins like none"),
    # What would fill the memory if it were made before it is counted.
    "one-word": (write(b"=" * 60), "none, or cut: of 60 bytes, where its first numbers say [0-9]{16}"),
    "endless": (
        write(struct.pack("<7i", SIZE, NEURONS, 2**31 - 1, HEADS, KV_HEADS, VOCAB, LENGTH)),
        "none, or cut: of 28 bytes, where its first numbers say 39994735448476",
    ),
    "empty": (write(b""), "begins like none of these"),
    "an-archive": (write(b"PK\x03\x04 and nothing else"), "must be a folder, an id on the Hub, or one file"),
    "safetensors": (safetensors, "it is none, or cut|begins like none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_file_is_refused_by_name(name, tmp_path):
    make, message = REFUSED[name]
    (tmp_path / "source").mkdir()
    path = make(tmp_path / "source")
    with pytest.raises(ValueError, match=message) as refused:
        convert_checkpoint(path, tmp_path / "out", progress=False)
    print(refused.value)
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == {"source"}


def test_code_in_a_file_is_not_run(tmp_path):
    (tmp_path / "source").mkdir()
    made = tmp_path / "source" / "made"
    torch.save(
        {"model": nanogpt_tensors(True), "model_args": arguments(), "x": Code(made)}, tmp_path / "source" / "x.pt"
    )
    with pytest.raises(ValueError, match="pickles of more than tensors, which run code"):
        convert_checkpoint(tmp_path / "source" / "x.pt", tmp_path / "out", progress=False)
    assert not made.exists()
    torch.load(tmp_path / "source" / "x.pt", weights_only=False)
    assert made.exists(), "the control: it would have run"


def test_options_of_folders_and_ids_are_refused_with_a_file(tmp_path):
    path, *_ = nanogpt(tmp_path / "source")
    for options in ({"revision": "main"}, {"gguf_file": "x.gguf"}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` belongs to a folder or an id.*Leave it out"):
            convert_checkpoint(path, tmp_path / "out", progress=False, **options)
