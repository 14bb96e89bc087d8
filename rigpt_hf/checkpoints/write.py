"""The one writer: tensors made shard by shard, all that travels along, a certificate, and then the folder appears."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .certificate import CERTIFICATE_NAME, Certificate, compare
from .companions import check_companions, save_config, save_generation_config, save_tokenizer
from .folder import Seen, new_folder
from .logits import LogitsSnapshot, longest_of, record_logits
from .read import load_model
from .weights import is_finite
from .workers import ALONE, Workers, together


DEFAULT_SHARD_SIZE = 5 * 10**9
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Entry:
    """
    One tensor to make: its name, shape and recipe.

    Args:
        name (`str`), shape (`tuple[int, ...]`): of the tensor.
        make (`Callable`): makes it in a dtype.
        kept (`torch.dtype`, *optional*): the dtype that it has in a source, if nothing is computed with it.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype], torch.Tensor]
    kept: torch.dtype | None = None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Size in bytes as `dtype`."""
        return prod(self.shape) * dtype.itemsize


@dataclass(frozen=True)
class Reference:
    """
    The model that a checkpoint must equal.

    Args:
        load (`Callable`): gives the model; its logits are recorded before anything is written, and it is freed.
        input_ids (`torch.LongTensor` of shape `[batch, seq]`): what both models are given.
        seed (`int`, *optional*): what the inputs were drawn from, if they were.
        source, target (`str`): what the certificate calls the two.
        device (`str`, defaults to `"cpu"`): where both compute.
        explanation (`str`, *optional*): what a difference means, for the error message.
    """

    load: Callable[[], Any]
    input_ids: torch.Tensor
    seed: int | None
    source: str
    target: str
    device: str = "cpu"
    explanation: str | None = None

    def record(self, load: Callable[[], Any], *, hashed: bool, like: LogitsSnapshot | None = None) -> LogitsSnapshot:
        """The logits of a model, loaded as any user would; nothing holds the model afterwards."""
        return record_logits(load().to(self.device), self.input_ids, hashed=hashed, like=like)


def finer_dtype(stored: torch.dtype, written: torch.dtype) -> torch.dtype:
    """The dtype to record a source in: the finer of two, as a cast to fewer digits is part of what is certified."""
    finer = torch.promote_types(stored, written)
    return finer if finer in (stored, written) else stored


def write_checkpoint(
    entries: Sequence[Entry],
    model_class: Any,
    config: PreTrainedConfig,
    assets_from: Path,
    output: Path,
    seen: Seen,
    *,
    dtype: torch.dtype,
    max_shard_size: int | str | None = None,
    certify_against: Reference | None,
    workers: Workers = ALONE,
    progress: str | None = None,
    beside: Callable[[Path], None] | None = None,
    **tokenizer_options: Any,
) -> Certificate | None:
    """
    Write a folder that `from_pretrained` loads, with a certificate that it is the function that it should be.

    The reference is loaded and freed before a shard of tensors is made, and each shard before the next: the peak of
    memory is the larger of the two models and one shard. The folder appears under its name only when it is complete
    and certified; on any error nothing is left.

    Args:
        entries (`Sequence[Entry]`): the tensors, in order.
        model_class (`type`), config (`PreTrainedConfig`): of the model they belong to.
        assets_from (`Path`): the folder whose generation config, tokenizer and chat template come along.
        output (`Path`), seen (`dict`): the folder to make, and what [`check_output`] gave of it.
        dtype (`torch.dtype`): of the stored tensors.
        max_shard_size (`int` or `str`, *optional*): largest file, in bytes or as a text such as "5GB" (the default).
        certify_against (`Reference`, *optional*): the model to compare the result with.
        workers (`Workers`, *optional*): the processes that share the shards; the main one does everything else.
        progress (`str`, *optional*): what the progress bar says; none if not given.
        beside (`Callable`, *optional*): writes into the folder what else belongs to it.
        tokenizer_options: passed to `AutoTokenizer.from_pretrained`.

    Returns:
        `Certificate`, also written to `certificate.json` in the folder; `None` without a reference.

    Raises:
        CertificateError: if the result differs from the reference by more than rounding.
        ValueError: if a tensor cannot be made, or nothing can be written to `output`.
    """
    check_companions(assets_from)
    shards = split_into_shards(entries, dtype, max_shard_size, workers.count)
    is_main = workers.index == 0
    before: LogitsSnapshot | None = None

    def write(folder: Path) -> None:
        nonlocal before
        if is_main and certify_against is not None:
            before = certify_against.record(certify_against.load, hashed=False)
        mine = dict(list(shards.items())[workers.index :: workers.count])
        write_shards(mine, folder, dtype, progress if is_main else None, str(assets_from))

    def finish(folder: Path) -> Certificate | None:
        write_index(shards, folder, dtype)
        save_config(config, model_class, folder, dtype)
        save_generation_config(assets_from, folder, config)
        save_tokenizer(assets_from, folder, **tokenizer_options)
        if beside is not None:
            beside(folder)
        if certify_against is None or before is None:
            return None
        after = certify_against.record(lambda: load_model(folder, model_class, dtype=dtype), hashed=True, like=before)
        certificate = compare(
            before,
            after,
            certify_against.input_ids,
            source=certify_against.source,
            target=certify_against.target,
            seed=certify_against.seed,
            names=("source", "output_dir"),
            positions=longest_of(config),
        ).check(certify_against.explanation)
        (folder / CERTIFICATE_NAME).write_text(certificate.to_json(), encoding="utf-8")
        return certificate

    with new_folder(output, seen, workers=workers) as folder:
        together(workers, lambda: write(folder))
        certificate = together(workers, lambda: finish(folder) if is_main else None)
    return workers.gather(certificate)[0]


def parse_size(size: int | str) -> int:
    """
    Bytes from a number or a text such as "500MB".

    Raises:
        ValueError: if the text is no number with a unit, or the size is not positive.
    """
    if isinstance(size, str):
        unit = UNITS.get(size[-2:].upper())
        number = size[:-2].strip()
        if unit is None or not number.replace(".", "", 1).isdigit():
            raise ValueError(
                f"`max_shard_size` must be a number of bytes or a text such as '500MB' or '5GB', got {size!r}."
            )
        size = int(float(number) * unit)
    if size < 1:
        raise ValueError(f"`max_shard_size` must be positive, got {size}.")
    return size


def split_into_shards(
    entries: Sequence[Entry], dtype: torch.dtype, max_shard_size: int | str | None, num_processes: int = 1
) -> dict[str, list[Entry]]:
    """
    Distribute tensors over files, in order, none larger than `max_shard_size` unless a single tensor is.

    Args:
        entries (`Sequence[Entry]`): the tensors.
        dtype (`torch.dtype`): they are stored as.
        max_shard_size (`int` or `str`, *optional*):
            Bytes, or a text such as "5GB". If not given: 5 GB, or less where that leaves processes without a shard.
        num_processes (`int`, defaults to 1): how many processes write.

    Returns:
        `dict[str, list[Entry]]`: the tensors of each file by its name.
    """
    if max_shard_size is None:
        share = ceil(sum(entry.nbytes(dtype) for entry in entries) / num_processes)
        limit = min(DEFAULT_SHARD_SIZE, share) if num_processes > 1 else DEFAULT_SHARD_SIZE
    else:
        limit = parse_size(max_shard_size)
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.nbytes(dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}


def write_shards(
    shards: dict[str, list[Entry]], folder: Path, dtype: torch.dtype, progress: str | None, source: str
) -> None:
    """
    Make the tensors of each shard and write them, one shard after the other.

    Args:
        shards (`dict[str, list[Entry]]`): the tensors of each file.
        folder (`Path`): where.
        dtype (`torch.dtype`): to store as.
        progress (`str`, *optional*): what the progress bar says; none if not given.
        source (`str`): what error messages call the checkpoint that they are made from.

    Raises:
        ValueError: if numbers of a tensor leave the range of `dtype`.
    """
    with tqdm(total=_nbytes(shards, dtype), unit="B", unit_scale=True, desc=progress, disable=not progress) as bar:
        for file, entries in shards.items():
            _write_shard(entries, folder / file, dtype, bar.update, source)
            # safetensors makes files for their owner alone; these are as open as what lies beside them.
            (folder / file).chmod(folder.stat().st_mode & 0o666)


def _nbytes(shards: dict[str, list[Entry]], dtype: torch.dtype) -> int:
    return sum(entry.nbytes(dtype) for entries in shards.values() for entry in entries)


def _write_shard(
    entries: list[Entry], path: Path, dtype: torch.dtype, advance: Callable[[int], Any], source: str
) -> None:
    # In one piece, which goes back to the system as a whole; many small ones would stay with the process.
    sizes = [prod(entry.shape) for entry in entries]
    tensors = {}
    for entry, place in zip(entries, torch.empty(sum(sizes), dtype=dtype).split(sizes), strict=True):
        tensors[entry.name] = place.view(entry.shape).copy_(entry.make(dtype))
        if not is_finite(place):
            raise ValueError(
                f"`source` must have weights whose products are numbers in {str(dtype).removeprefix('torch.')}, got "
                f"{source!r}, by which `{entry.name}` would not be finite. Ask for a `dtype` with more range, or see "
                "whether its weights are damaged."
            )
        advance(entry.nbytes(dtype))
    save_file(tensors, path, metadata={"format": "pt"})


def write_index(shards: dict[str, list[Entry]], folder: Path, dtype: torch.dtype) -> None:
    """The table of which tensor is in which file; nothing where there is a single file."""
    if len(shards) == 1:
        return
    total = _nbytes(shards, dtype)
    index = {
        "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
        "weight_map": {entry.name: file for file, entries in shards.items() for entry in entries},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
