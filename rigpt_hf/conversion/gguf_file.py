"""
One GGUF file of a stock model, written tensor by tensor, and read back.

A file says nothing of the activation, and of the order in which rotary planes stand: both follow from the name of the
architecture.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..checkpoints.read import quiet_loading, reading, silent
from ..checkpoints.weights import Rows, name_some
from ..checkpoints.write import Entry
from .activations import RIGPT_ACTIVATIONS
from .export import ExportPlan
from .gguf_grid import BLOCK, REACH, encoded, on_grid
from .gguf_tokenizer import write_tokenizer
from .llama import head_dim


logger = logging.get_logger(__name__)

# What a tensor may be stored as, by the library's name or llama.cpp's, with GGUF's; the last two are rounded.
GGUF_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
ROUNDED = ("q8_0", "q4_0")
CODES = "codes"  # each tensor on the coarsest grid that all of its numbers lie on
# Stored in more digits than the rest of a file in four bits, as llama.cpp does it: the tables of tokens.
TABLES = EMBEDDING, HEAD = "token_embd.weight", "output.weight"


Make = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class GgufArchitecture:
    """
    A stock class as llama.cpp knows it.

    Args:
        name (`str`): its name there.
        activation (`str`): what it computes, whatever a file says.
        neighbours (`bool`, defaults to `False`): two rows that are turned together are neighbours there.
        factors (`bool`, defaults to `False`): a file may hold factors for its rotary frequencies.
        biases (`bool`, defaults to `True`): its maps may have biases.
        tied (`bool`, defaults to `True`): its head may be the table of tokens; if not, a file has that table twice.
        read_back (`bool`, defaults to `True`): Transformers reads it from GGUF.
    """

    name: str
    activation: str
    neighbours: bool = False
    factors: bool = False
    biases: bool = True
    tied: bool = True
    read_back: bool = True


# By `model_type`; in this order they are tried.
ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "silu", neighbours=True, factors=True),
    "qwen2": GgufArchitecture("qwen2", "silu"),
    "gpt2": GgufArchitecture("gpt2", "gelu_pytorch_tanh"),
    "arcee": GgufArchitecture("arcee", "relu2", neighbours=True, factors=True, biases=False, read_back=False),
    "qwen3": GgufArchitecture("qwen3", "silu", biases=False),
    "apertus": GgufArchitecture("apertus", "xielu", factors=True, tied=False, read_back=False),
}


def check_known(config: Any) -> GgufArchitecture:
    """
    The entry of the table for a stock configuration.

    Raises:
        ValueError: if llama.cpp has no such class, or computes another function under its name.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise ValueError(f"`model_type` must be one of {', '.join(ARCHITECTURES)}, got {config.model_type!r}.")
    field = "activation_function" if hasattr(config, "activation_function") else "hidden_act"
    activation = getattr(config, field)
    if RIGPT_ACTIVATIONS.get(activation, activation) != known.activation:
        raise ValueError(
            f"`{field}` must be {known.activation!r}, got {activation!r}: a GGUF file does not say which activation "
            f"it has, and llama.cpp computes this one for all that is called {known.name!r}."
        )
    biased = [field for field in ("attention_bias", "mlp_bias") if getattr(config, field, False)]
    if biased and not known.biases:
        raise ValueError(f"{name_some(biased)} must be False: llama.cpp's {known.name!r} has maps without biases.")
    if getattr(config, "sliding_window", None) is not None:
        raise ValueError(
            f"`sliding_window` must be None, got {config.sliding_window}: a GGUF file of {known.name!r} cannot say "
            "it, and llama.cpp's layers see everything before them."
        )
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    possible = ["default", "linear", "yarn", *(["llama3"] if known.factors else [])] if rope else ["default"]
    if kind not in possible or (odd := {"attention_factor", "mscale", "mscale_all_dim", "truncate"} & rope.keys()):
        got = repr(kind) if kind not in possible else name_some(odd)
        raise ValueError(
            f"`rope_parameters` must be of a type that a GGUF file of {known.name!r} can say ({', '.join(possible)}), "
            f"with the library's own constants, got {got}."
        )
    return known


def rope_of(config: Any) -> dict[str, Any]:
    """The parameters of a stock configuration's rotation; none if positions are learned."""
    return {key: value for key, value in (getattr(config, "rope_parameters", None) or {}).items() if value is not None}


def write_gguf(
    plan: ExportPlan, path: Path, dtype: str, tokenizer: Any, name: str, progress: str | None = None
) -> list[str]:
    """
    Write a stock model as one GGUF file, one tensor after the other.

    Args:
        plan (`ExportPlan`): class, configuration and tensors.
        path (`Path`): the file.
        dtype (`str`): one of `GGUF_DTYPES`, or `CODES`.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): without one, programs take ids of tokens alone.
        name (`str`): what programs call the model.
        progress (`str`, *optional*): what the progress bar says; none if not given.

    Returns:
        `list[str]`: the tensors of which some numbers were rounded, where 8 or 4 bits are wanted.

    Raises:
        ValueError: if llama.cpp computes something else, or numbers leave the range of `dtype`.
    """
    import gguf

    known = check_known(plan.config)
    writer = gguf.GGUFWriter(path, known.name)
    writer.add_name(name)
    tensors = list(_tensors(plan, known))
    types = {key: kind_of(key, shape, dtype, make) for key, shape, make in tensors}
    wanted = GGUF_DTYPES.get(dtype, "Q4_0" if "Q4_0" in types.values() else "Q8_0")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if wanted == 'F32' else 'MOSTLY'}_{wanted}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_facts(writer, plan, known)
    write_tokenizer(writer, tokenizer, plan.config)
    kinds = {key: gguf.GGMLQuantizationType[name] for key, name in types.items()}
    if narrow := [key for key, kind in kinds.items() if kind.name == "F16" and wanted in REACH]:
        logger.warning(
            f"{name_some(narrow)}: rows whose length is no multiple of {BLOCK} cannot be rounded to {wanted.lower()}, "
            "and are stored in float16."
        )
    total, inexact = 0, narrow
    for key, shape, _ in tensors:
        nbytes = nbytes_of(prod(shape), kinds[key].name)
        writer.add_tensor_info(key, shape, np.dtype(np.float32), nbytes, raw_dtype=kinds[key])
        total += nbytes
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(total=total, unit="B", unit_scale=True, desc=progress, disable=not progress) as bar:
            for key, _, make in tensors:
                tensor = make()
                _check_range(key, tensor, kinds[key].name)
                rounded = gguf.quants.quantize(tensor.numpy(), kinds[key])
                if kinds[key].name in REACH:
                    rounded, is_exact = encoded(tensor.numpy(), kinds[key].name, rounded)
                    inexact += [] if is_exact else [key]
                writer.write_tensor_data(rounded)
                bar.update(rounded.nbytes)
    finally:
        writer.close()
    return inexact


def read_gguf(path: Path, plan: ExportPlan, dtype: torch.dtype) -> Any:
    """The stock model whose weights are those of a file, as Transformers reads them."""
    with reading("output_dir", path, "be a file in GGUF"), silent(), quiet_loading():
        return plan.model_class.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=plan.config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )


def nbytes_of(numbers: int, kind: str) -> int:
    """Bytes of so many numbers, stored as GGUF calls it."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return numbers // block * size


def kind_of(name: str, shape: tuple[int, ...], dtype: str, make: Make | None = None) -> str:
    """The type that a tensor is stored in, as GGUF calls it; for `CODES` its numbers decide."""
    if len(shape) < 2 or name == "position_embd.weight":
        return "F32"
    if dtype in (*ROUNDED, CODES) and shape[-1] % BLOCK:
        return "F16"
    if dtype == CODES:
        assert make is not None, "numbers decide"
        return "Q4_0" if on_grid(make().numpy(), "Q4_0")[2].all() else "Q8_0"
    return "Q8_0" if dtype in ROUNDED and name in TABLES else GGUF_DTYPES[dtype]


def keeps_codes(plan: ExportPlan) -> bool:
    """Whether a map of the first layer still lies on a grid, which it does not once its frame is turned."""
    maps = [(shape, make) for key, shape, make in _tensors(plan, check_known(plan.config)) if key.startswith("blk.0.")]
    maps = [(shape, make) for shape, make in maps if len(shape) == 2 and not shape[-1] % BLOCK]
    return any(bool(on_grid(make().numpy(), "Q8_0")[2].all()) for _, make in maps)


def _check_range(name: str, tensor: torch.Tensor, kind: str) -> None:
    largest = np.finfo(np.float16).max if kind == "F16" else np.inf
    if not bool(torch.isfinite(tensor).all()) or float(tensor.abs().max()) > largest:
        raise ValueError(
            f"`source` must have weights whose products are numbers in {kind}, and `{name}` would not be finite. Ask "
            "for a `dtype` with more range, or see whether its weights are damaged."
        )


def _tensors(plan: ExportPlan, known: GgufArchitecture) -> Iterator[tuple[str, tuple[int, ...], Make]]:
    """Names, shapes and recipes (in float32) of the tensors of a file."""
    import gguf

    config = plan.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with torch.device("meta"), silent():  # a class warns of kernels that it could use
        skeleton = plan.model_class(config)
    transposed = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
    for entry in plan.entries:
        if _is_fact(entry):
            continue
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"`{entry.name}` of {plan.model_class.__name__} has no name in a GGUF file.")
        turns = known.neighbours and entry.name.split(".")[-2] in ("q_proj", "k_proj")
        shape = entry.shape[::-1] if entry.name in transposed else entry.shape
        make = _recipe(entry, entry.name in transposed, head_dim(config) if turns else 0)
        yield name, shape, make
        if name == EMBEDDING and config.tie_word_embeddings and not known.tied:
            yield HEAD, shape, make
    if known.factors and rope_of(config).get("rope_type") == "llama3":
        factors = frequency_factors(config)
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors


def _recipe(entry: Entry, transposed: bool, head: int) -> Make:
    def make() -> torch.Tensor:
        tensor = entry.make(torch.float32).cpu()
        if head:
            part, tensor = tensor, torch.empty_like(tensor)
            Rows(0, head, head, interleaved=head).place(part, tensor)
        return tensor.T.contiguous() if transposed else tensor

    return make


def frequency_factors(config: Any) -> torch.Tensor:
    """By what a stock model's rotary frequencies `[head_dim / 2]` are smaller than those of its base alone."""
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    size = head_dim(config)
    powers = torch.arange(0, size, 2, dtype=torch.float64) / size
    return (config.rope_parameters["rope_theta"] ** -powers / scaled.to(torch.float64)).to(torch.float32)


def _is_fact(entry: Entry) -> bool:
    """A number of the activation of a layer, which stands among the facts."""
    return entry.name.split(".")[-2] == "act_fn"


def _write_facts(writer: Any, plan: ExportPlan, known: GgufArchitecture) -> None:
    """All that llama.cpp is told of a stock model's shape."""
    config = plan.config
    in_layers: dict[str, list[float]] = {}
    for entry in filter(_is_fact, plan.entries):
        in_layers.setdefault(entry.name.rpartition(".")[2], []).append(float(entry.make(torch.float32)))
    for name, values in in_layers.items():
        getattr(writer, f"add_{known.activation}_{name}")(values)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = config.n_inner if hasattr(config, "n_inner") else config.intermediate_size
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if not (rope := rope_of(config)):
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_string(f"{known.name}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings", config.max_position_embeddings)
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1.0))
