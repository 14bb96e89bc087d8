"""`transform_checkpoint`: a gauge transformation of a RiGPT on disk or on the Hub, tensor by tensor."""

import gc
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..configuration_rigpt import RiGPTConfig
from ..conversion.assemble import quiet_loading
from ..conversion.certificate import (
    Certificate,
    CertificateError,
    Observation,
    compare,
    observe,
    random_input_ids,
)
from ..conversion.checkpoint import local_folder
from ..conversion.companions import save_config, save_generation_config, save_tokenizer
from ..conversion.maps import name_some
from ..conversion.output import check_output, publish, temporary_sibling
from ..conversion.plan import Entry
from ..conversion.shards import Shard, split_into_shards, write_index, write_shard
from ..conversion.sources import SafetensorsSource
from ..frames import table_of
from ..modeling_rigpt import RiGPTForCausalLM
from .action import GaugeTransformation


# Bytes of a table in float64 that are transformed at once, where its rows do not mix.
CHUNK = 2**27


def transform_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    transformation: GaugeTransformation,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    max_shard_size: int | str | None = None,
    seed: int = 0,
    progress: bool = True,
    certificate: bool = True,
) -> Certificate | None:
    """
    Apply a gauge transformation to a checkpoint, and certify that the result is the same function.

    Weights are read, transformed in float64 and written one tensor at a time. For the certificate the source is loaded
    and freed before the result is: never are both in memory, and the peak stays below the larger checkpoint's size
    plus 1 GB. The folder appears under its name only when it is complete and certified; on any error nothing is left.

    Args:
        source (`str` or `Path`):
            A local folder with safetensors (one file, or shards and their index), or the id of a repository on the
            Hub.
        output_dir (`str` or `Path`):
            The folder to make.
        transformation (`GaugeTransformation`):
            For models of the source's configuration.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`torch.dtype`, *optional*):
            Of the result; the source's if not given.
        force (`bool`, defaults to `False`):
            Replace an earlier model in `output_dir`, once the new one is complete.
        max_shard_size (`int` or `str`, *optional*):
            Largest file, in bytes or as a text such as "5GB" (the default).
        seed (`int`, defaults to 0):
            For the certificate's random inputs.
        progress (`bool`, defaults to `True`):
            Show a progress bar.
        certificate (`bool`, defaults to `True`):
            Compare the result with the source. Without, a matrix outside of the group goes unnoticed.

    Returns:
        `Certificate`, also written to `certificate.json` in the folder; `None` without one.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        ValueError: if the source is not a RiGPT, its weights or the transformation do not belong to its configuration,
            or an argument is impossible; the message names which.
    """
    name, output = str(source), Path(output_dir)
    check_output(output, name, force)
    folder = local_folder(name, revision)
    config = check_rigpt(AutoConfig.from_pretrained(folder), name)
    weights = SafetensorsSource(folder)
    entries = _entries(weights, _belonging_to(transformation, config, name), config)
    stored = reduce(torch.promote_types, (weights.dtype(entry.name) for entry in entries))
    dtype = dtype or stored
    shards = split_into_shards(entries, dtype, max_shard_size)
    input_ids = random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed)
    temporary = temporary_sibling(output)
    try:
        temporary.mkdir(parents=True)
        # The finer of the two dtypes: a cast to fewer digits is part of what is certified.
        finer = torch.promote_types(stored, dtype)
        # Of the source a certificate names no weights.
        kind = finer if finer in (stored, dtype) else stored
        before = _observe(folder, kind, input_ids, hashed=False) if certificate else None
        _write(shards, temporary, dtype, progress)
        save_config(config, temporary, dtype)
        save_generation_config(folder, temporary, config)
        save_tokenizer(folder, temporary)
        result = None
        if before is not None:
            after = _observe(temporary, dtype, input_ids)
            result = compare(before, after, input_ids, source=name, target=str(output), seed=seed)
            _check(result, name)
            result.save(temporary)
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return result


def check_rigpt(config: Any, source: str) -> RiGPTConfig:
    """
    `config` itself, if it is that of a RiGPT with a head for language modeling.

    Raises:
        ValueError: if it is not; the message says what to do with `source`.
    """
    if not isinstance(config, RiGPTConfig):
        raise ValueError(
            f"`source` must be a RiGPT, got {source!r} of model type {config.model_type!r}. Convert it first: "
            f"rigpt convert {source} OUTPUT"
        )
    architectures = config.architectures or [RiGPTForCausalLM.__name__]
    if RiGPTForCausalLM.__name__ not in architectures:
        raise ValueError(
            f"`source` must be a {RiGPTForCausalLM.__name__}, got {source!r}, which is a {architectures[0]}. Give the "
            "language model it was made from, or transform it in memory with `GaugeTransformation`."
        )
    return config


def _belonging_to(transformation: GaugeTransformation, config: RiGPTConfig, source: str) -> GaugeTransformation:
    """The same elements with the table of frames of `config`, if they fit it."""
    try:
        return GaugeTransformation(config, transformation.elements)
    except ValueError as error:
        raise ValueError(
            f"`transformation` must be one of models with the configuration of {source!r}. {error}"
        ) from error


def _entries(weights: SafetensorsSource, g: GaugeTransformation, config: RiGPTConfig) -> tuple[Entry, ...]:
    """Every tensor of the result and its recipe."""
    table = table_of(config)
    entries = []
    for name, shape in _checked_shapes(weights, config).items():
        rows_mix = any(turned.dim == 0 for turned in table.turns(name))
        entries.append(Entry(name, shape, _recipe(weights, g, name, rows_mix)))
    return tuple(entries)


def _checked_shapes(weights: SafetensorsSource, config: RiGPTConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the model and their shapes, the same on disk; a tied head is not one of them."""
    with torch.device("meta"):
        model = RiGPTForCausalLM(config)
    tied = model._tied_weights_keys if config.tie_word_embeddings else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    keys = weights.keys()
    for problem, names in (
        ("lacks", shapes.keys() - keys),
        ("has no place for", keys - shapes.keys() - tied.keys()),
        ("gives another shape to", {name for name in shapes.keys() & keys if weights.shape(name) != shapes[name]}),
    ):
        if names:
            raise ValueError(
                f"`source` must hold the weights of its configuration, but {problem} {name_some(names)}. Save the "
                f"whole {RiGPTForCausalLM.__name__} once more with `save_pretrained`."
            )
    for copy, original in tied.items():
        if copy in keys and not torch.equal(weights.read(copy), weights.read(original)):
            raise ValueError(
                f"`{copy}` differs from `{original}` although `tie_word_embeddings=True`. Set "
                "`tie_word_embeddings=False` in the source's configuration to keep it, or remove it."
            )
    return shapes


def _recipe(
    weights: SafetensorsSource, g: GaugeTransformation, name: str, rows_mix: bool
) -> Callable[[torch.dtype], torch.Tensor]:
    def make(dtype: torch.dtype) -> torch.Tensor:
        tensor = weights.read(name)
        result = torch.empty(tensor.shape, dtype=dtype)
        rows = len(tensor) if rows_mix else max(1, CHUNK // (8 * prod(tensor.shape[1:])))
        for part, place in zip(tensor.split(rows), result.split(rows), strict=True):
            place.copy_(g.transform(name, part.to(torch.float64), weights.read))
        return result

    return make


def _write(shards: list[Shard], folder: Path, dtype: torch.dtype, progress: bool) -> None:
    total = sum(entry.nbytes(dtype) for shard in shards for entry in shard.entries)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Transforming") if progress else nullcontext() as bar:
        for shard in shards:
            write_shard(shard, folder, dtype, (lambda n: None) if bar is None else bar.update)
    write_index(shards, folder, dtype)


def _observe(folder: Path, dtype: torch.dtype, input_ids: torch.Tensor, hashed: bool = True) -> Observation:
    """What the model in a folder gives, loaded as any user would, and freed."""
    with quiet_loading():
        model = RiGPTForCausalLM.from_pretrained(folder, dtype=dtype)
    observation = observe(model, input_ids, hashed=hashed)
    del model
    gc.collect()
    return observation


def _check(certificate: Certificate, source: str) -> None:
    if not certificate.passed:
        raise CertificateError(
            f"`transformation` must leave the function of {source!r} alone up to rounding, but it changes the logits "
            f"by {certificate.relative_logit_error:.3e} of the largest, more than {certificate.tolerance:.0e} in "
            f"{certificate.dtype}. Either it is not in the gauge group of this configuration, or its result needs "
            "more digits: ask for a finer `dtype`."
        )
