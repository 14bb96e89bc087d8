"""The weights behind the codes of a quantized folder, as Transformers and the library that made them give them."""

import os
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..quantized_rigpt import METHOD, Coded, RiGPTQuantizationConfig
from .pack_quantized import METHOD as PACKED
from .pack_quantized import bits_of, decoded_tensors
from .read import check_model, load_model, local_folder, quiet_loading, reading, silent
from .weights import check_shapes


# What must be installed for each method that can be decoded.
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    PACKED: "compressed_tensors",
    METHOD: "rigpt_hf",
}


def method_of(config: Any) -> str | None:
    """How the weights of a configuration are quantized, in the library's word; `None` where they are plain numbers."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    method = given.get("quant_method") or ("bitsandbytes" if given.get("load_in_8bit") else "unknown")
    return str(getattr(method, "value", method))


def codes_in_words(config: Any) -> str | None:
    """The codes of a RiGPT, such as "codes of 4 bits in groups of 32, tables of 8 bits"; `None` if it has none."""
    if method_of(config) != METHOD:
        return None
    given = config.quantization_config
    given = RiGPTQuantizationConfig(**given) if isinstance(given, dict) else given
    words = [f"codes of {given.bits} bits in {f'groups of {given.group}' if given.group else 'rows'}"]
    words.append(f"tables of {given.table_bits} bits")
    words += [f"activations of {given.activation_bits} bits"] if given.activation_bits else []
    words += [f"a cache of {given.cache_bits} bits"] if given.cache_bits else []
    return ", ".join(words)


def in_words(config: Any) -> str:
    """The same in brackets, behind the name of a method."""
    words = codes_in_words(config)
    return f" ({words})" if words else ""


def numbers_of(model: Any) -> int:
    """The parameters of a model, where it has codes those of the weights behind them; tied ones count once."""
    coded = {
        module.codes: module.shape[0] * module.shape[1] for module in model.modules() if isinstance(module, Coded)
    }
    stored = {one for module in model.modules() if isinstance(module, Coded) for one in (module.scales, module.gain)}
    plain = (parameter.numel() for parameter in model.parameters() if parameter not in {*coded, *stored})
    return sum(coded.values()) + sum(plain)


def dtype_in_words(model: Any) -> str:
    """How the weights of a model are stored, and in what it computes where these are codes."""
    return ", in ".join(filter(None, (codes_in_words(model.config), str(model.dtype).removeprefix("torch."))))


def of_weights(model: Any) -> Any:
    """The model itself, or a copy in float32 of one of codes: what asks how weights turn wants weights."""
    if not any(isinstance(module, Coded) for module in model.modules()):
        return model
    return deepcopy(model).dequantize(torch.float32)


@dataclass(frozen=True)
class Decoded:
    """The class, configuration and weights of a model whose codes have become numbers of float32; all in memory."""

    model_class: Any
    config: Any
    weights: dict[str, torch.Tensor]

    def load(self, dtype: torch.dtype | None) -> Any:
        """The model that computes with these numbers."""
        with quiet_loading():
            model = self.model_class.from_pretrained(
                None, config=self.config, state_dict=self.weights, dtype=dtype or torch.float32
            )
        return model.eval()


def dequantized(
    source: str | os.PathLike, config: Any, *, argument: str = "source", revision: str | None = None
) -> Decoded:
    """
    A quantized model, decoded to float32 where it has codes.

    Args:
        source (`str` or `Path`), argument, revision: as for [`load_config`], which gave `config`.

    Raises:
        ValueError: if its method cannot be decoded here; the message says what to install where that helps.
    """
    method = method_of(config)
    package = PACKAGES.get(str(method))
    if package is None:
        raise ValueError(
            f"`{argument}` must hold weights, or codes of {', '.join(PACKAGES)}, which can be decoded, got "
            f"{str(source)!r}, whose `quantization_config` says {method!r}. Give the model that was quantized."
        )
    if method == PACKED and (decoded := _packed(local_folder(source, revision, argument), config, argument)):
        return decoded
    if not _is_installed(package):
        raise ValueError(
            f"`{argument}` is quantized by {method!r}, and {package!r}, which decodes it, is not installed, got "
            f"{str(source)!r}. Install it, or give the model that was quantized."
        )
    model = load_model(source, argument=argument, revision=revision, dtype="auto", dequantize=True)
    with reading(argument, source, "be a model whose weights can be decoded"), silent():
        if getattr(model, "hf_quantizer", None) is not None and not _is_dense(model):
            with suppress(NotImplementedError):  # where tensors decode themselves
                model = model.dequantize(torch.float32)
        plain = deepcopy(model.config)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        with torch.device("meta"):
            wanted = type(model)(deepcopy(plain)).state_dict()
        held = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
        tensors = {name: _decoded(held[name]) for name in wanted}
        if odd := [name for name, tensor in tensors.items() if tensor.shape != wanted[name].shape]:
            raise ValueError(f"`{odd[0]}` is still made of codes. Give the model that was quantized")
    return Decoded(type(model), plain, tensors)


def _packed(folder: Path, config: Any, argument: str) -> Decoded | None:
    """
    A folder in the layout of `pack_quantized.py`, read without its library, which rounds products to the dtype of the
    scales; `None` where there are other codes, or names that are not those of the class.
    """
    given = config.quantization_config
    bits = bits_of(given if isinstance(given, dict) else given.to_dict())
    if bits is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    check_model(folder, argument=argument)
    plain, model_class = deepcopy(config), MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    del plain.quantization_config
    with torch.device("meta"), silent():
        mould = model_class(deepcopy(plain))
    tensors = decoded_tensors(folder, bits, argument)
    if tensors.keys() - mould.state_dict().keys():
        return None
    check_shapes(mould, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, argument, folder)
    return Decoded(model_class, plain, tensors)


def _is_dense(model: Any) -> bool:
    return bool(getattr(getattr(model.config, "quantization_config", None), "dequantize", False))


def _decoded(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor; codes that are a kind of tensor of their own know how to become one."""
    tensor = tensor.detach()
    return tensor if type(tensor) is torch.Tensor else tensor.dequantize().to(torch.float32)


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None
