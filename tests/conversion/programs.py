"""What nanoGPT and llama2.c save, and what they compute: from their formulas, independent of any model class."""

import struct
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional


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


def nanogpt_tensors(bias: bool, tied: bool = True) -> Tensors:
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
    table = tensors["transformer.wte.weight"]
    return tensors | {"lm_head.weight": table if tied else table.flip(0, 1)}


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
def nanogpt(folder: Path, bias: bool = True, tied: bool = True, **options):
    tensors = nanogpt_tensors(bias, tied)
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
    "nanogpt-untied": partial(nanogpt, tied=False),
    "nanogpt-compiled": partial(nanogpt, prefix="_orig_mod."),
    "llama2c": llama2c,
    "llama2c-untied": partial(llama2c, tied=False),
    "llama2c-eps": partial(llama2c, norm_eps=1e-3, hidden_dim=None),
    "llama2c-bin": partial(llama2c, binary=True),
    "llama2c-bin-untied": partial(llama2c, binary=True, tied=False),
}
