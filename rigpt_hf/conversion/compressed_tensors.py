"""`export_compressed_tensors`: a RiGPT of codes becomes a folder of codes of a stock class, which vLLM reads."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers.utils import logging

from ..checkpoints.certificate import CERTIFICATE_NAME, Certificate, CertificateError, compare
from ..checkpoints.companions import check_companions, save_config, save_generation_config, save_tokenizer
from ..checkpoints.dequantized import dequantized, in_words, method_of, of_weights
from ..checkpoints.folder import check_output, new_folder
from ..checkpoints.logits import random_input_ids, record_logits
from ..checkpoints.named import check_rigpt
from ..checkpoints.pack_quantized import PARTS, layout, pack_words
from ..checkpoints.read import load_config, load_model, local_folder, silent
from ..checkpoints.weights import check_made, name_some
from ..frames import layer_of
from ..modeling_rigpt import RiGPTForCausalLM
from ..packed_rigpt import QuantizedLinear, unpack
from ..quantization.maps import token_tables
from ..quantized_rigpt import HEAD, METHOD, RiGPTQuantizationConfig
from ..terminal import notices_after, notices_held, say_notices
from .export import ExportPlan, plan_export


logger = logging.get_logger(__name__)

CONVERSION = __name__.rpartition(".")[0]
AGAIN = "Make it by `rigpt quantize SOURCE CODES --tune 0`"
# Codes `[m, n]` of int8 and scales `[m, n / group]` of float16, by the names of linear maps.
Maps = dict[str, tuple[torch.Tensor, torch.Tensor]]


@notices_after(CONVERSION)
def export_compressed_tensors(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    frame: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    seed: int = 0,
) -> Certificate:
    """
    Export a folder of codes to one of the stock class in which it is smallest, in the layout `pack-quantized` of
    compressed-tensors.

    Linear maps in the layers keep every code and every scale. Tables of tokens, and maps that the class has in no
    such form, are numbers and stand under `ignore`. What was written is read back; maps must be the same number for
    number, and the certificate compares the logits of the weights behind the source's codes with those of the
    folder's, all computed in float32.

    Args:
        source (`str` or `Path`): a folder, or the id of a repository; `revision` (`str`, *optional*) of the latter.
        output_dir (`str` or `Path`): the folder to make; it appears complete or not at all.
        frame (`str`, defaults to `"auto"`): as for [`export_model`]; a stream whose codes would be lost is not turned.
        dtype (`torch.dtype`, *optional*): of what has no codes; the source's if not given. Scales have float16, or
            float32 beside float32, as the library of the layout multiplies in their dtype.
        force (`bool`, defaults to `False`): replace an earlier model in `output_dir`, once the new one is complete.
        seed (`int`, defaults to 0): for the certificate's random inputs.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        ValueError: if the source has no codes, or codes that the layout or the class cannot keep.
    """
    output, name = Path(output_dir), str(source)
    seen = check_output(output, name, force)
    folder = local_folder(name, revision)
    config = load_config(folder)
    given = check_codes_alone(config, name)
    check_companions(folder)
    coded = load_model(folder, RiGPTForCausalLM)
    model, form, dtype = of_weights(coded).eval(), (given.bits, given.group), dtype or coded.dtype
    with torch.no_grad():
        for table in token_tables(model):  # as tables of codes give their rows
            weight = model.get_submodule(table).weight
            weight.copy_(weight.to(dtype))
    logger.warning(f"{name} is quantized by {METHOD}{in_words(config)}.")
    target = "auto"
    for tried in ("auto", "stream") if frame == "auto" else (frame,):
        with notices_held(CONVERSION) as notices:
            plan = plan_export(model, target, tried, even=False)
        target = plan.config.model_type  # the way to another frame is short once the class is known
        if maps := dict(kept(plan, coded, form)):
            break
    say_notices(notices)
    called = plan.model_class.__name__
    if stacked := [entry.name for entry in plan.entries if len(entry.shape) > 2]:
        raise ValueError(
            f"`source` must have no experts for `--to compressed-tensors`, got {name!r}: {called} stacks them as "
            f"{name_some(stacked, 1)}, where no code is kept. Keep it as RiGPT."
        )
    if not maps:
        raise ValueError(
            f"`source` must have codes that a stock class can keep, got {name!r}, none of which is one in {called} in "
            "this frame. Take `--frame stream` or `--to gguf`, or keep it as RiGPT."
        )
    bits, linear = max(given.bits, 4), linear_maps(plan)  # codes of 3 bits are stored as 4
    tensors = stored_tensors(plan, maps, bits, dtype)
    check_made(tensors, "source", "Ask for a `dtype` with more range.")
    say_what_is_dense([module for module, may in linear.items() if may and module not in maps], called, dtype)
    stock_config = copy.deepcopy(plan.config)
    stock_config.quantization_config = layout(bits, given.group, [name for name in linear if name not in maps])
    ids = random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed)
    with new_folder(output, seen) as temporary:
        before = record_logits(model, ids, hashed=False)
        save_torch_state_dict(tensors, temporary, max_shard_size="5GB")
        for file in temporary.glob("*.safetensors"):  # which safetensors makes for their owner alone
            file.chmod(temporary.stat().st_mode & 0o666)
        save_config(stock_config, plan.model_class, temporary, dtype)
        save_generation_config(folder, temporary, stock_config)
        save_tokenizer(folder, temporary)
        decoded = dequantized(temporary, load_config(temporary), argument="output_dir")
        for entry in plan.entries:
            if entry.name.removesuffix(".weight") in maps:
                check_same(entry.name, decoded.weights[entry.name], entry.make(torch.float32))
        # What has no codes was rounded, so the tolerance is that of its dtype, and the arithmetic is not.
        after = replace(record_logits(decoded.load(None), ids), dtype=dtype)
        certificate = compare(
            before,
            after,
            ids,
            source=f"{name} ({type(model).__name__}, the weights behind its codes)",
            target=f"{output} ({called}, decoded, computed in float32)",
            seed=seed,
            names=("source", "output_dir"),
            positions=config.max_position_embeddings,
        ).check()
        (temporary / CERTIFICATE_NAME).write_text(certificate.to_json(), encoding="utf-8")
    return certificate


def check_codes_alone(config: Any, name: str) -> RiGPTQuantizationConfig:
    """
    The codes of a configuration that has codes and scales alone.

    Raises:
        ValueError: if it has none, or more than codes and scales make its function.
    """
    plain = copy.deepcopy(config)
    if method_of(config) == METHOD:
        del plain.quantization_config
    check_rigpt(plain, name)
    if method_of(config) is None:
        raise ValueError(
            f"`source` must be a folder of codes for `--to compressed-tensors`, got {name!r}, which has weights. "
            f"{AGAIN}."
        )
    given = config.quantization_config
    given = RiGPTQuantizationConfig(**given) if isinstance(given, dict) else given
    for field in ("activation_bits", "cache_bits"):
        if (bits := getattr(given, field)) is not None:
            raise ValueError(
                f"`source` must have codes for weights alone, got {name!r} with `{field}={bits}`, which is simulated. "
                f"{AGAIN}, without `--activations` and `--cache`."
            )
    if gained := [module for module in given.modules_with_gain if layer_of(f"{module}.weight") is not None]:
        raise ValueError(
            f"`source` must have codes and scales alone, got {name!r}, where {name_some(gained, 1)} have factors of "
            f"their inputs, which compressed-tensors has not. {AGAIN}, and not with `--method round --frame own`."
        )
    return given


def linear_maps(plan: ExportPlan) -> dict[str, bool]:
    """The linear maps of a stock model by name, and whether programs read codes of each, as not of the head."""
    with torch.device("meta"), silent():  # a class warns of kernels that it could use
        skeleton = plan.model_class(copy.deepcopy(plan.config))
    head = skeleton.get_output_embeddings()
    return {name: module is not head for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}


def kept(
    plan: ExportPlan, coded: RiGPTForCausalLM, form: tuple[int, int | None]
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """
    Codes and scales of the linear maps of a stock model that are made of rows of maps with codes.

    A class may join maps and order their rows as it likes: a row is known by its numbers, which are those behind its
    codes exactly or not at all.

    Args:
        plan (`ExportPlan`): the stock model.
        coded (`RiGPTForCausalLM`): the source.
        form (`tuple`): the bits and the group of all codes that are looked for.
    """
    places: dict[bytes, tuple[int, int]] = {}
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, module in coded.named_modules():
        if isinstance(module, QuantizedLinear) and name != HEAD and (module.bits, module.group) == form:
            for row, digest in enumerate(_digests(module.dense(torch.float32))):
                places[digest] = len(held), row
            held.append((module.codes, module.scales))
    linear = linear_maps(plan)
    for entry in plan.entries:
        module = entry.name.removesuffix(".weight")
        if not linear.get(module):
            continue
        with suppress(KeyError):
            rows = [places[digest] for digest in _digests(entry.make(torch.float32))]
            codes, scales = (torch.stack([held[at][part][row] for at, row in rows]) for part in (0, 1))
            yield module, (unpack(codes, entry.shape[1]), scales)


def _digests(matrix: torch.Tensor) -> Iterator[bytes]:
    """A digest of every row `[n]`, by which it is known; the two zeros are one."""
    return (blake2b(row, digest_size=16).digest() for row in (matrix + 0.0).contiguous().numpy())


def stored_tensors(plan: ExportPlan, maps: Maps, bits: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name: codes and scales of `maps`, everything else as numbers."""
    scales_dtype = torch.float16 if dtype.itemsize == 2 else torch.float32
    tensors: dict[str, torch.Tensor] = {}
    for entry in plan.entries:
        module = entry.name.removesuffix(".weight")
        if module not in maps:
            tensors[entry.name] = entry.make(dtype)
            continue
        codes, scales = maps[module]
        parts = (pack_words(codes, bits), scales.to(scales_dtype), torch.tensor(codes.shape))
        tensors |= {f"{module}.{part}": tensor for part, tensor in zip(PARTS, parts, strict=True)}
    return tensors


def check_same(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise a `CertificateError` if codes and scales that were read back are another map."""
    if not torch.equal(found, wanted):
        raise CertificateError(f"`{name}` must be read back as it is in the source, got other numbers. Report this.")


def say_what_is_dense(lost: list[str], called: str, dtype: torch.dtype) -> None:
    """Log which maps and tables have no codes."""
    kind = str(dtype).removeprefix("torch.")
    logger.warning(f"Tables of tokens have no codes in this layout, and are numbers of {kind}.")
    if lost:
        logger.warning(
            f"{name_some(lost)}: no codes that {called} could keep, so numbers of {kind}. vLLM wants codes for all or "
            "none of the queries, keys and values of a layer, and of gate and up."
        )
