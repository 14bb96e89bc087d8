"""Checkpoints of nanoGPT and llama2.c: against what those programs compute, written here from their formulas."""

import os
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.read import load_model
from rigpt_hf.conversion import convert_checkpoint, export_checkpoint
from rigpt_hf.conversion.files import read_file
from rigpt_hf.symmetry import GaugeTransformation, gauge_error

from ..checkpoints.folders import contents
from ..models import tokens
from ..tolerances import CONVERSION, SYMMETRY


SIZE, LAYERS, HEADS, KV_HEADS, NEURONS, VOCAB, LENGTH = 24, 3, 4, 2, 40, 61, 32
NANOGPT = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": SIZE, "block_size": LENGTH, "vocab_size": VOCAB}
LLAMA2C = {"dim": SIZE, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCAB, "max_seq_len": LENGTH}

Tensors = dict[str, torch.Tensor]


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> Tensors:
    """Random weights; gains around 1, and biases that are not 0."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    is_gain = {name: "norm" in name or (".ln_" in name and name.endswith("weight")) for name in shapes}
    return {name: (tensor + is_gain[name]).to(dtype) for name, tensor in drawn.items()}


def nanogpt_tensors(bias: bool) -> Tensors:
    shapes = {"transformer.wte.weight": (VOCAB, SIZE), "transformer.wpe.weight": (LENGTH, SIZE)}
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.ln_1.weight": (SIZE,), f"{block}.ln_2.weight": (SIZE,)}
        shapes |= {f"{block}.attn.c_attn.weight": (3 * SIZE, SIZE), f"{block}.attn.c_proj.weight": (SIZE, SIZE)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * SIZE, SIZE), f"{block}.mlp.c_proj.weight": (SIZE, 4 * SIZE)}
    shapes |= {"transformer.ln_f.weight": (SIZE,)}
    if bias:
        tables = ("wte.weight", "wpe.weight")
        own = {name: shape for name, shape in shapes.items() if not name.endswith(tables)}
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in own.items()}
    tensors = drawn(shapes)
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def nanogpt_logits(tensors: Tensors, ids: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (SIZE,), tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), 1e-5)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    x = tensors["transformer.wte.weight"][ids] + tensors["transformer.wpe.weight"][: ids.shape[1]]
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        joined = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).unflatten(-1, (3, HEADS, -1))
        values = functional.scaled_dot_product_attention(*joined.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + linear(f"{block}.attn.c_proj", values.transpose(1, 2).flatten(2))
        neurons = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", functional.gelu(neurons, approximate=approximate))
    return norm("transformer.ln_f", x) @ tensors["lm_head.weight"].T


def llama2c_tensors(tied: bool, dtype: torch.dtype = torch.float64) -> Tensors:
    keys = KV_HEADS * SIZE // HEADS
    shapes = {"tok_embeddings.weight": (VOCAB, SIZE), "norm.weight": (SIZE,), "output.weight": (VOCAB, SIZE)}
    for name, shape in {
        "attention_norm": (SIZE,),
        "attention.wq": (SIZE, SIZE),
        "attention.wk": (keys, SIZE),
        "attention.wv": (keys, SIZE),
        "attention.wo": (SIZE, SIZE),
        "ffn_norm": (SIZE,),
        "feed_forward.w1": (NEURONS, SIZE),
        "feed_forward.w2": (SIZE, NEURONS),
        "feed_forward.w3": (NEURONS, SIZE),
    }.items():
        shapes |= {f"layers.{layer}.{name}.weight": shape for layer in range(LAYERS)}
    tensors = drawn(shapes, dtype)
    return tensors | ({"output.weight": tensors["tok_embeddings.weight"]} if tied else {})


def llama2c_logits(tensors: Tensors, ids: torch.Tensor, eps: float = 1e-5, neighbours: bool = True) -> torch.Tensor:
    """The planes of a head are neighbouring coordinates, or, which is wrong, half a head apart."""
    tensors = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    size = SIZE // HEADS
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * frequencies
    turn = torch.complex(angles.cos().to(torch.float64), angles.sin().to(torch.float64))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]

    def heads(name: str, x: torch.Tensor, turned: bool) -> torch.Tensor:
        parts = (x @ tensors[f"{name}.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
        if turned:
            planes = parts.unflatten(-1, (-1, 2)) if neighbours else parts.unflatten(-1, (2, -1)).transpose(-1, -2)
            parts = torch.view_as_real(torch.view_as_complex(planes.contiguous()) * turn).flatten(-2)
        return parts.repeat_interleave(HEADS // parts.shape[1], dim=1)

    x = tensors["tok_embeddings.weight"][ids]
    for layer in range(LAYERS):
        block = f"layers.{layer}"
        seen = norm(f"{block}.attention_norm", x)
        parts = (heads(f"{block}.attention.{name}", seen, name != "wv") for name in ("wq", "wk", "wv"))
        values = functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        x = x + values @ tensors[f"{block}.attention.wo.weight"].T
        seen = norm(f"{block}.ffn_norm", x)
        gate, up, down = (tensors[f"{block}.feed_forward.{name}.weight"].T for name in ("w1", "w3", "w2"))
        x = x + (functional.silu(seen @ gate) * (seen @ up)) @ down
    return norm("norm", x) @ tensors["output.weight"].T


def save(folder: Path, tensors: Tensors, arguments: dict, prefix: str = "") -> Path:
    """As both programs save it while they train."""
    folder.mkdir(exist_ok=True)
    model = {prefix + name: tensor for name, tensor in tensors.items()}
    others = {"optimizer": {"state": {}, "param_groups": []}, "iter_num": 7, "best_val_loss": torch.tensor(1.0)}
    torch.save({"model": model, "model_args": arguments, **others, "config": {"device": "cpu"}}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def save_bin(folder: Path, tensors: Tensors, tied: bool) -> Path:
    """A `.bin` of version 0."""
    folder.mkdir(exist_ok=True)
    parts = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm"]
    parts += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    layers = [f"layers.{layer}.{part}" for part in parts for layer in range(LAYERS)]
    order = [tensors[f"{name}.weight"] for name in ["tok_embeddings", *layers, "norm"]]
    order += [torch.zeros(LENGTH, SIZE // HEADS), *[tensors["output.weight"]] * (not tied)]
    vocabulary = VOCAB if tied else -VOCAB
    header = struct.pack("<7i", SIZE, NEURONS, LAYERS, HEADS, KV_HEADS, vocabulary, LENGTH)
    path = folder / "model.bin"
    path.write_bytes(header + b"".join(tensor.to(torch.float32).numpy().tobytes() for tensor in order))
    return path


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest."""
    return float((logits - expected).abs().max() / expected.abs().max())


# What is written, what it computes, and what it would compute if it were read wrongly, by the id of the test.
def nanogpt(folder: Path, bias: bool = True, **options):
    tensors = nanogpt_tensors(bias)
    path = save(folder, tensors, NANOGPT | {"bias": bias, "dropout": 0.0}, **options)
    return path, partial(nanogpt_logits, tensors), partial(nanogpt_logits, tensors, approximate="tanh")


def llama2c(folder: Path, tied: bool = True, binary: bool = False, **arguments):
    tensors = llama2c_tensors(tied, torch.float32 if binary else torch.float64)
    eps = arguments.get("norm_eps", 1e-5)
    arguments = LLAMA2C | {"n_kv_heads": KV_HEADS, "multiple_of": 32, "dropout": 0.0} | arguments
    path = save_bin(folder, tensors, tied) if binary else save(folder, tensors, arguments, "_orig_mod.")
    right = partial(llama2c_logits, tensors, eps=eps)
    return path, right, partial(right, neighbours=False)


FILES = {
    "nanogpt": nanogpt,
    "nanogpt-no-biases": partial(nanogpt, bias=False),
    "nanogpt-compiled": partial(nanogpt, prefix="_orig_mod."),
    "llama2c": llama2c,
    "llama2c-untied": partial(llama2c, tied=False),
    "llama2c-eps": partial(llama2c, norm_eps=1e-3, hidden_dim=None),
    "llama2c-bin": partial(llama2c, binary=True),
    "llama2c-bin-untied": partial(llama2c, binary=True, tied=False),
}


@pytest.mark.parametrize("name", FILES)
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
        path, right, _ = FILES[name](tmp_path / name)
        convert_checkpoint(path, tmp_path / f"{name}-rigpt", progress=False)
        assert export_checkpoint(tmp_path / f"{name}-rigpt", tmp_path / f"{name}-back", target=target).passed
        back, ids = load_model(tmp_path / f"{name}-back"), tokens(1, 12)
        assert back.config.tie_word_embeddings
        with torch.no_grad():
            off = difference(back(ids).logits, right(ids))
        assert off <= 1e2 * CONVERSION[torch.float32] * (name == "llama2c") or off <= CONVERSION[torch.float64]


def test_the_end_of_a_text_is_known_where_the_tokenizer_is(tmp_path):
    for vocabulary, end in ((50304, 50256), (VOCAB, None)):
        tensors = {
            name: tensor[:1].expand(vocabulary, -1) if "w" in name[:17] and len(tensor) == VOCAB else tensor
            for name, tensor in nanogpt_tensors(True).items()
        }
        path = save(tmp_path, tensors, NANOGPT | {"bias": True, "vocab_size": vocabulary})
        assert read_file(path).config.eos_token_id == end


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


def torch_file(content):
    def make(folder: Path) -> Path:
        torch.save(content, folder / "file")
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
    "odd-heads": (with_(n_head=5), "divisible by num_heads"),
    "a-word": (with_(n_embd="many"), "`n_embd` must be a whole number, got 'many'"),
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
    "cut": (cut, "it is none, or cut: by its first numbers it would have"),
    "text": (write(b"once upon a time there was a file"), "it is none, or cut|begins like none"),
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
