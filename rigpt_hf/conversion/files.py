"""
Checkpoints of nanoGPT and llama2.c, each a single file: a GPT-2 and a Llama in another container.

A file becomes a stock class, its configuration and tensors under stock names; what holds of that class holds of it.
Tensors are mapped, not read, and nothing but tensors and plain values is unpickled.
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import reduce
from math import inf, prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard
from zipfile import ZipFile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ..checkpoints.read import quiet_loading, reading
from ..checkpoints.source import AGAIN, check_readable, shown
from ..checkpoints.weights import MASKS, Rows, name_some, wrapper_of


logger = logging.get_logger(__name__)

KNOWN = "be a folder, an id on the Hub, or one file: a .gguf, or a checkpoint of nanoGPT or llama2.c"
# What `model_args` may say. Forks have more options, and each of them may be another network.
COUNT = (lambda value: type(value) is int and value >= 1, "a whole number of at least 1")
COUNT_OR_NONE = (lambda value: value is None or COUNT[0](value), f"{COUNT[1]}, or None")
TRUTH = (lambda value: type(value) is bool, "True or False")
PROBABILITY = (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1")
POSITIVE = (lambda value: type(value) in (int, float) and 0 < value < inf, "a number above 0")
Options = Mapping[str, tuple[Callable[[Any], bool], str]]
NANOGPT: Options = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), COUNT),
    "bias": TRUTH,
    "dropout": PROBABILITY,
}
LLAMA2C: Options = {
    **dict.fromkeys(("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len"), COUNT),
    **dict.fromkeys(("n_kv_heads", "hidden_dim"), COUNT_OR_NONE),
    "multiple_of": COUNT,  # which chose the size that `w1` has
    "norm_eps": POSITIVE,
    "dropout": PROBABILITY,
}
GPT2_VOCABULARIES, END_OF_TEXT = (50257, 50304), 50256  # the tokenizer's, and rounded up to a multiple of 64
FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
PICKLE = rb"\x80[\x02-\x05][^\x00]"  # a pickle goes on with what to do, a `.bin` with the third byte of its size
LATER_VERSIONS = 0x616B3432  # how a `.bin` of llama2.c begins that is not of version 0
ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER = {  # in the order of a `.bin`
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


class StockFile(NamedTuple):
    """The content of a file, as a stock model."""

    model_class: Any
    config: Any
    tensors: dict[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which none of its tensors loses digits."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors.values()))

    def load(self, dtype: torch.dtype) -> Any:
        """The stock model."""
        with quiet_loading():
            return self.model_class.from_pretrained(None, config=self.config, state_dict=self.tensors, dtype=dtype)


def read_file(path: Path, argument: str = "source") -> StockFile:
    """
    The stock model in a file of nanoGPT (`ckpt.pt`) or llama2.c (`ckpt.pt`, or a `.bin` of version 0).

    nanoGPT's GELU is read as the exact one, which it has had since 2023; a file does not say which one it had.

    Args:
        path (`Path`): the file.
        argument (`str`, defaults to `"source"`): what error messages call it.

    Raises:
        ValueError: if it is none, is damaged, holds more than tensors and plain values, or has an option that is not
            known; the message names it.
    """
    check_readable(path, argument)
    with reading(argument, path, KNOWN), path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
        arguments, tensors = _unpickled(path) if is_archive else _legacy(path)
        make = _nanogpt if "n_embd" in arguments else _llama2c
        try:
            stock = make(arguments, tensors)
        except KeyError as error:
            raise ValueError(
                f"`{error.args[0]}` is missing from it. Save it with the program as it is today"
            ) from error
        _check_shapes(stock)
    return stock


def _unpickled(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The options and the tensors in a file of `torch.save`, without what a compiled model puts before its names."""
    # A tensor that is mapped is not looked at by torch.
    with ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"`{damaged}` in it is damaged: its checksum is another. {AGAIN}")
    held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    arguments, tensors = (held.get(name) if isinstance(held, dict) else None for name in ("model_args", "model"))
    if not _is_named(arguments) or not _is_named(tensors):
        raise ValueError("`model` and `model_args` are not in it, as in what those two save. Name another file")
    if odd := [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]:
        raise ValueError(f"{name_some(odd)} in it is no tensor. Name another file")
    if odd := [name for name, tensor in tensors.items() if not _is_plain(name, tensor)]:
        raise ValueError(
            f"{name_some(odd)} in it must be plain numbers in {', '.join(FLOATS.values())}, got one of "
            f"{tensors[odd[0]].dtype}, {tensors[odd[0]].layout} on {tensors[odd[0]].device}. Save them as such"
        )
    prefix = wrapper_of(tensors)
    return dict(arguments), {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _is_plain(name: str, tensor: torch.Tensor) -> bool:
    is_known = tensor.dtype in FLOATS or name.endswith(MASKS)
    return is_known and tensor.layout is torch.strided and not tensor.is_meta


def _is_named(held: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(held, Mapping) and bool(held) and all(isinstance(key, str) for key in held)


def _legacy(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The same of a `.bin` of version 0: seven whole numbers, and then all tensors in float32 in one fixed order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(28)
    if re.match(PICKLE, header):
        raise ValueError(
            "`torch.save` of torch 1.6 or later must have written it, and this is a bare pickle or of the format "
            "before that, which are not read. Load it with the program that saved it, and save it again"
        )
    numbers = struct.unpack("<7i", header) if len(header) == 28 else (0,) * 7
    if numbers[0] == LATER_VERSIONS:
        raise ValueError(
            f"`.bin` files are read in version 0, and this is version {numbers[1]}. Export it with `--version 0`, or "
            "name the `.pt` that it was made from"
        )
    dim, hidden, layers, heads, kv_heads, vocab, length = numbers
    # The sign says whether the head is the table of tokens.
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    arguments = dict(zip(names, (*numbers[:5], abs(vocab), length), strict=True))
    if min(arguments.values()) < 1 or dim % heads:
        raise ValueError("it begins like none of these")
    keys = kv_heads * (dim // heads)
    shapes = dict(zip(LAYER, [(dim,), (dim, dim), (keys, dim), (keys, dim), (dim, dim), (dim,)], strict=False))
    shapes |= dict(zip(list(LAYER)[6:], [(hidden, dim), (dim, hidden), (hidden, dim)], strict=True))
    # Counted before anything of that size is made: whatever file was named has such numbers.
    in_layers = layers * sum(map(prod, shapes.values()))
    wanted = 28 + 4 * (abs(vocab) * dim * (1 + (vocab < 0)) + in_layers + dim + length * (dim // heads))
    if size != wanted:
        raise ValueError(f"it is none, or cut: of {size} bytes, where its first numbers say {wanted}")
    order: list[tuple[str, tuple[int, ...]]] = [("tok_embeddings", (abs(vocab), dim))]
    order += [(f"layers.{layer}.{name}", shape) for name, shape in shapes.items() for layer in range(layers)]
    order += [("norm", (dim,)), ("freqs", (length, dim // heads))]  # cosines and sines, which follow from the rest
    order += [("output", (abs(vocab), dim))] * (vocab < 0)
    flat = torch.from_file(str(path), size=size // 4, dtype=torch.float32)[7:]
    split = zip(order, flat.split([prod(shape) for _, shape in order]), strict=True)
    return arguments, {f"{name}.weight": part.view(shape) for (name, shape), part in split if name != "freqs"}


def _check_shapes(stock: StockFile) -> None:
    layers, there = stock.config.num_hidden_layers, len(stock.tensors)
    if layers > there:  # before so many are made
        raise ValueError(f"`model_args` in it says {layers} layers, and there are {there} tensors in all. {AGAIN}")
    with torch.device("meta"):
        wanted = stock.model_class(deepcopy(stock.config)).state_dict()
    for name, tensor in stock.tensors.items():
        if name in wanted and (shape := tensor.shape) != wanted[name].shape:
            raise ValueError(
                f"`{name}` has shape {list(shape)} in it, and {list(wanted[name].shape)} by its `model_args`. {AGAIN}"
            )


def _check_options(arguments: Mapping[str, Any], known: Options, program: str) -> None:
    if unknown := sorted(arguments.keys() - known.keys()):
        raise ValueError(
            f"`model_args` in it has {name_some(unknown)}, which {program} does not: a fork of it may be another "
            "network. Write it as a model of Transformers, and convert that"
        )
    for name, value in arguments.items():
        fits, rule = known[name]
        if not fits(value):
            raise ValueError(f"`{name}` in its `model_args` must be {rule}, got {shown(repr(value))}. {AGAIN}")


def _check_divides(arguments: Mapping[str, Any], name: str, part: str) -> None:
    if arguments[name] % arguments[part]:
        raise ValueError(
            f"`{name}` in its `model_args` must be divisible by `{part}`, got {arguments[name]} and "
            f"{arguments[part]}. {AGAIN}"
        )


def _nanogpt(arguments: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> StockFile:
    """Linear maps where GPT-2 has them transposed, and GELU as it is; biases that are absent are 0."""
    _check_options(arguments, NANOGPT, "nanoGPT")
    vocabulary, dropout = arguments["vocab_size"], arguments.get("dropout", 0.0)
    _check_divides(arguments, "n_embd", "n_head")
    end = END_OF_TEXT if vocabulary in GPT2_VOCABULARIES else None
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=arguments["block_size"],
        n_embd=arguments["n_embd"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        tie_word_embeddings=_is_tied(tensors["transformer.wte.weight"], tensors.get("lm_head.weight")),
    )
    named = dict(tensors)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and not module.endswith(("wte", "wpe", "lm_head")):
            if not arguments["bias"]:
                named.setdefault(f"{module}.bias", tensor.new_zeros(tensor.shape[0]))
            if tensor.dim() == 2:
                named[name] = tensor.T
    return StockFile(GPT2LMHeadModel, config, named)


def _llama2c(arguments: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> StockFile:
    """A Llama whose rotary planes are neighbours; Transformers has them half a head apart."""
    _check_options(arguments, LLAMA2C, "llama2.c")
    heads, dropout = arguments["n_heads"], arguments.get("dropout", 0.0)
    kv_heads = arguments.get("n_kv_heads") or heads
    _check_divides(arguments, "dim", "n_heads")
    _check_divides({**arguments, "n_kv_heads": kv_heads}, "n_heads", "n_kv_heads")
    table, head = tensors["tok_embeddings.weight"], tensors.get("output.weight")
    if dropout:
        logger.warning(
            f"`dropout={dropout}` of llama2.c is carried over for probabilities, and not for coordinates, which Llama "
            "never drops. Evaluation is unaffected; training differs."
        )
    config = LlamaConfig(
        vocab_size=arguments["vocab_size"],
        hidden_size=arguments["dim"],
        intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=arguments["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=arguments["max_seq_len"],
        rms_norm_eps=arguments.get("norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_dropout=dropout,
        tie_word_embeddings=_is_tied(table, head),
    )
    return StockFile(LlamaForCausalLM, config, dict(_renamed(tensors, heads, kv_heads)))


def _is_tied(table: torch.Tensor, head: torch.Tensor | None) -> bool:
    return head is None or (head.dtype == table.dtype and torch.equal(head, table))


def _renamed(tensors: Mapping[str, torch.Tensor], heads: int, kv_heads: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        place = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        if name in ("freqs_cos", "freqs_sin") or name.endswith("mask"):
            continue  # they follow from the configuration
        if place and place[2] in LAYER:
            if place[2] in ("attention.wq", "attention.wk"):
                head = tensor.shape[0] // (heads if place[2] == "attention.wq" else kv_heads)
                tensor = Rows(0, head, head, interleaved=head).take(tensor)
            module = f"model.layers.{place[1]}.{LAYER[place[2]]}"
        yield f"{ENDS.get(module, module)}.{kind}", tensor
