"""Writing safetensors tensor by tensor, so that no shard is ever held in memory, and the index over several."""

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import BinaryIO

import torch

from .plan import Entry
from .sources import DTYPES, INDEX_NAME, SINGLE_NAME


DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
DEFAULT_SHARD_SIZE = 5 * 10**9
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
CHUNK = 2**24  # bytes


@dataclass(frozen=True)
class Shard:
    """One file to write, and the tensors in it."""

    file_name: str
    entries: tuple[Entry, ...]


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
    entries: tuple[Entry, ...], dtype: torch.dtype, max_shard_size: int | str | None, num_processes: int = 1
) -> list[Shard]:
    """
    Distribute tensors over files, in order, none larger than `max_shard_size` unless a single tensor is.

    Args:
        entries (`tuple[Entry, ...]`): the tensors.
        dtype (`torch.dtype`): they are stored as.
        max_shard_size (`int` or `str`, *optional*):
            Bytes, or a text such as "5GB". If not given: 5 GB, or less where that leaves processes without a shard.
        num_processes (`int`, defaults to 1): how many processes write.
    """
    if max_shard_size is None:
        share = ceil(sum(entry.nbytes(dtype) for entry in entries) / num_processes)
        limit = min(DEFAULT_SHARD_SIZE, share) if num_processes > 1 else DEFAULT_SHARD_SIZE
    else:
        limit = parse_size(max_shard_size)
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes(dtype) > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes(dtype)
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def write_shard(shard: Shard, folder: Path, dtype: torch.dtype, advance=lambda nbytes: None) -> None:
    """
    Make the tensors of one shard and write them, one after the other.

    Args:
        shard (`Shard`): what to write.
        folder (`Path`): where.
        dtype (`torch.dtype`): to store as.
        advance (`Callable`): called with the bytes of each tensor once it is written.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard.entries:
        end = offset + entry.nbytes(dtype)
        header[entry.name] = {
            "dtype": DTYPE_CODES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    with (folder / shard.file_name).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in shard.entries:
            _write_tensor(file, entry.make(dtype).cpu())
            advance(entry.nbytes(dtype))


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """The bytes of a contiguous tensor (little-endian, as on every platform PyTorch runs on)."""
    numbers = tensor.reshape(-1).view(torch.uint8)
    for chunk in numbers.split(CHUNK):
        file.write(chunk.numpy().data)


def write_index(shards: list[Shard], folder: Path, dtype: torch.dtype) -> None:
    """The table of which tensor is in which file; nothing where there is a single file."""
    if len(shards) == 1:
        return
    entries = [entry for shard in shards for entry in shard.entries]
    total = sum(entry.nbytes(dtype) for entry in entries)
    index = {
        "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
        "weight_map": {entry.name: shard.file_name for shard in shards for entry in shard.entries},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
