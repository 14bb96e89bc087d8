"""Weights: the tensors of a folder or of a model in memory, none of them read before it is asked for."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..status import doing
from .source import AGAIN, check_readable, read_json, shown


# What DDP and `torch.compile` put in front of the names of a model they have wrapped.
WRAPPERS = ("module.", "_orig_mod.")
# Ends of the names of masks in old files of GPT-2 and its kin, which are bytes.
MASKS = (".attn.bias", ".attention.bias")
# Names that safetensors has for the dtypes of weights (masks in old GPT-2 files are U8 or BOOL).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK = 2**22  # numbers of a tensor that are hashed at a time


@dataclass(frozen=True)
class Rows:
    """
    The rows of a part of a fused map: `length` from `start` on, of every `period`.

    The first `interleaved` rows of each part are pairs of neighbours, which a rotation turns together. As a part, the
    first of all pairs come first, then the second of all. With `swapped` the halves of each part change places: what
    turned one way turns the other.
    """

    start: int
    length: int
    period: int
    interleaved: int = 0
    swapped: bool = False

    def take(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """These rows of `whole`, where they stand along `dim`."""
        parts = whole.unflatten(dim, (-1, self.period)).narrow(dim + 1, self.start, self.length)
        if self.interleaved or self.swapped:
            parts = parts.index_select(dim + 1, self._order(whole.device))
        return parts.flatten(dim, dim + 1)

    def place(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write `part` into these rows of `whole`."""
        places = whole.unflatten(0, (-1, self.period)).narrow(1, self.start, self.length)
        places[:, self._order(whole.device)] = part.unflatten(0, (-1, self.length))

    def _order(self, device: torch.device) -> torch.Tensor:
        """The rows of a part, from its start on, in the order in which it has them."""
        rows, turning = torch.arange(self.length, device=device), self.interleaved
        order = torch.cat((rows[:turning:2], rows[1:turning:2], rows[turning:]))
        return order.roll(self.length // 2) if self.swapped else order


class Weights:
    """
    Named tensors of a model in memory.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): a state dict.
    """

    origin = ""  # where messages say that the tensors are

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, rows: Rows | None = None, dim: int = 0) -> torch.Tensor:
        """
        A tensor, or some of its rows, which stand along `dim`; from a file, no more than those are read.

        Raises:
            ValueError: if its size is no multiple of the period of `rows`, or it holds numbers that are not finite.
        """
        if rows is None:
            tensor = self._get(name)
        elif (size := self.shapes[name][dim]) % rows.period:
            raise ValueError(
                f"`{name}` must be made of parts of {rows.period} rows by the configuration, got {size}. The "
                "checkpoint is damaged, or the configuration does not belong to it."
            )
        elif size == rows.period:
            part = self._slice(name, dim, rows.start, rows.length)
            tensor = replace(rows, start=0, period=rows.length).take(part, dim)
        else:
            tensor = rows.take(self._get(name), dim)
        if not tensor.is_floating_point():
            raise ValueError(
                f"`{name}`{self.origin and f' of {self.origin!r}'} must hold numbers of floating point, got "
                f"{tensor.dtype}. Save the whole model once more with `save_pretrained`."
            )
        check_finite(name, tensor, self.origin)
        return tensor

    def _get(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def _slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        return self._get(name).narrow(dim, start, length)

    def check_copy(self, copy: str, original: str) -> None:
        """Raise a `ValueError` if there is a second copy of a tied table that is none."""
        if copy in self.shapes and not torch.equal(self.read(copy), self.read(original)):
            raise ValueError(
                f"`{copy}` differs from `{original}` although `tie_word_embeddings=True`. Set "
                "`tie_word_embeddings=False` in the source's configuration to keep it, or remove it."
            )


class StoredWeights(Weights):
    """
    The tensors of a folder of safetensors, each read when asked for, under the names that they have in the model.

    Files are read with `pread`, not mapped: mapped pages stay resident and would count towards the peak of memory.

    Args:
        folder (`Path`): holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        device (`str`, defaults to `"cpu"`): where tensors are put.
        argument (`str`, defaults to `"source"`): what error messages call the folder.

    Raises:
        ValueError: as [`stored_tensors`], or if a tensor holds codes.
    """

    def __init__(self, folder: Path, device: str = "cpu", argument: str = "source"):
        self.device, self.origin = device, str(folder)
        stored = stored_tensors(folder, argument)
        self.prefix = wrapper_of(stored)
        self._files: dict[str, Path] = {}
        self._open: tuple[Path | None, Any] = (None, None)
        self.shapes, self.dtypes = {}, {}
        for key, tensor in stored.items():
            name = key.removeprefix(self.prefix)
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"`{name}` is stored as {tensor.dtype}; weights must be one of {', '.join(DTYPES)} to be folded. "
                    "Start from a checkpoint that is not quantized."
                )
            self._files[name], self.shapes[name], self.dtypes[name] = tensor.file, tensor.shape, DTYPES[tensor.dtype]

    def _handle(self, name: str) -> Any:
        path = self._files[name]
        if self._open[0] != path:  # one open file at a time, however many shards there are
            self._open = path, safe_open(path, framework="pt", backend="pread")
        return self._open[1]

    def _get(self, name: str) -> torch.Tensor:
        return self._handle(name).get_tensor(self.prefix + name).to(self.device)

    def _slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        where = (slice(None),) * dim + (slice(start, start + length),)
        return self._handle(name).get_slice(self.prefix + name)[where].to(self.device)


class StoredTensor(NamedTuple):
    """The file of a tensor, and its shape and dtype in the words of safetensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path, argument: str = "source") -> dict[str, StoredTensor]:
    """
    The tensors of a folder of safetensors by name, from the headers of the files alone.

    As for the library, `model.safetensors` comes before an index and its shards.

    Raises:
        ValueError: if there are no safetensors, a file is damaged, missing or outside of the folder, or the index and
            the shards disagree; the message names the file.
    """
    weight_map: dict[str, str] | None = None
    files, index = [SAFE_WEIGHTS_NAME], folder / SAFE_WEIGHTS_INDEX_NAME
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        if not index.is_file():
            raise ValueError(
                f"`{argument}` must be a folder with `{SAFE_WEIGHTS_NAME}` or `{SAFE_WEIGHTS_INDEX_NAME}`, got "
                f"{str(folder)!r}, which has neither. Older formats: load the model with `from_pretrained` and use "
                "`convert_model`, or save it once more with `save_pretrained`."
            )
        weight_map = read_json(index, argument).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(
                f"`{argument}` must have a `{SAFE_WEIGHTS_INDEX_NAME}` that says in `weight_map` which tensor is in "
                f"which file, got {str(index)!r}, which does not. {AGAIN}"
            )
        files = sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if Path(file).name != file:
            raise ValueError(
                f"`{argument}` must have all its files in its own folder, got {str(index)!r}, which names {file!r}. "
                f"{AGAIN}"
            )
        if not (folder / file).is_file():
            raise ValueError(
                f"`{SAFE_WEIGHTS_INDEX_NAME}` names the shard {file!r}, which is missing from {str(folder)!r}. "
                "Download it again."
            )
        tensors |= _header(folder / file, argument)
    if weight_map is not None and set(weight_map) != set(tensors):
        odd = sorted(set(weight_map) ^ set(tensors))
        raise ValueError(f"`{SAFE_WEIGHTS_INDEX_NAME}` and its shards disagree about {odd[0]!r}. Download them again.")
    return tensors


def _header(path: Path, argument: str) -> dict[str, StoredTensor]:
    check_readable(path, argument)
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            return {
                name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(
            f"`{argument}` must hold whole files of weights, got {str(path)!r}, which is cut or damaged "
            f"({shown(str(error).rpartition('header: ')[2])}). {AGAIN}"
        ) from error


def wrapper_of(names: Iterable[str]) -> str:
    """The prefix of all names where a wrapped model was saved; empty otherwise."""
    names, prefix = list(names), ""
    while names and (more := [w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)]):
        prefix += more[0]
    return prefix


def check_finite(name: str, tensor: torch.Tensor, origin: str = "") -> None:
    """Raise a `ValueError` if a tensor of a folder or id holds numbers that are not finite; it says in which rows."""
    if is_finite(tensor):
        return
    place = ""
    if tensor.dim() > 1:
        rows = [index for index, row in enumerate(tensor) if not is_finite(row)]
        place = f" in {len(rows)} of {len(tensor)} rows, the first of them row {rows[0]}"
    raise ValueError(
        f"`{name}`{origin and f' of {origin!r}'} must hold finite numbers, got NaN or infinity{place}. The checkpoint "
        "is damaged; download or save it once more."
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Least and largest need no copy, and either is NaN where any number is.
    return not tensor.is_floating_point() or not tensor.numel() or all(map(math.isfinite, tensor.aminmax()))


def check_made(weights: Mapping[str, torch.Tensor], argument: str, advice: str) -> None:
    """A `ValueError` if weights that were made, and shall be written, are not finite in their dtype."""
    if name := next((name for name, tensor in weights.items() if not is_finite(tensor)), None):
        dtype = str(weights[name].dtype).removeprefix("torch.")
        raise ValueError(
            f"`{argument}` must give weights that are finite numbers in {dtype}, got NaN or infinity in `{name}`. "
            f"{advice}"
        )


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of some names, quoted, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(f"`{name}`" for name in ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


def check_layers(config: Any, stored: Mapping[str, Any], argument: str, source: str | os.PathLike) -> None:
    """Raise a `ValueError` if a configuration has more layers than there are tensors at all."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise ValueError(
            f"`{argument}` must have a configuration that belongs to its weights, got {str(source)!r}: "
            f"`num_hidden_layers` is {shown(layers)}, and there are {len(stored)} tensors in all. Restore its "
            "`config.json`."
        )


def check_shapes(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    argument: str,
    source: str | os.PathLike,
    *,
    only_shapes: bool = False,
) -> dict[str, tuple[int, ...]]:
    """
    Raise if stored tensors are not those of a model.

    Args:
        model (`PreTrainedModel`): the model, also without memory for its weights.
        shapes (`Mapping[str, tuple[int, ...]]`): of the stored tensors.
        argument (`str`), source (`str` or `Path`): what the checkpoint is called, and its folder or id.
        only_shapes (`bool`, defaults to `False`): leave it to others whether the same tensors are there.

    Returns:
        `dict[str, tuple[int, ...]]`: the shapes of the model's tensors, without those that are tied to others.

    Raises:
        ValueError: names the first few tensors.
    """
    tied = (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    own = {name: shape for name, shape in wanted.items() if name not in tied}
    check_names(
        argument,
        str(source),
        missing=() if only_shapes else own.keys() - shapes.keys(),
        unexpected=() if only_shapes else shapes.keys() - wanted.keys(),
        mismatched={name: (shapes[name], shape) for name, shape in wanted.items() if shapes.get(name, shape) != shape},
    )
    return own


def check_names(
    argument: str,
    source: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
) -> None:
    """
    Raise if a checkpoint has not exactly the tensors that its configuration asks for.

    Args:
        argument (`str`), source (`str`): what the checkpoint is called, and its folder or id.
        missing, unexpected (`Iterable[str]`): names of tensors.
        mismatched (`dict`, *optional*): by name the stored shape and the one that the configuration asks for.

    Raises:
        ValueError: names the first few of them.
    """
    for problem, names in (
        ("lacks", missing),
        ("has no place for", unexpected),
        ("gives another shape to", mismatched or {}),
    ):
        if names := list(names):
            first = (mismatched or {}).get(sorted(names)[0])
            shape = f" ({list(first[0])}, not {list(first[1])})" if first and "shape" in problem else ""
            remedy = "Save the whole model once more with `save_pretrained`"
            if shape:
                remedy = "Correct the sizes in its `config.json`, or resize the model and save it once more"
            raise ValueError(
                f"`{argument}` must hold the weights of its configuration, got {source!r}, which {problem} "
                f"{name_some(names)}{shape}. {remedy}."
            )


@doing("Hashing the weights")
def weights_sha256(model: nn.Module) -> str:
    """
    SHA-256 of a model's dtype and of all its tensors by name: name, shape, dtype, bytes.

    It is that of values and not of files: saved again in other shards they are the same. Numbers of 16 bits count as
    what they are in float32, as some small tensors come so from a file of 16 bits. No more than a tensor is copied.

    Returns:
        `str`: 64 hexadecimal digits, or nothing if some weights are not in memory (on the meta device).
    """
    digest = hashlib.sha256(str(getattr(model, "dtype", "")).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            return ""
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        digest.update(json.dumps([name, list(tensor.shape), str(dtype)]).encode())
        for chunk in tensor.detach().contiguous().flatten().split(CHUNK):
            digest.update(chunk.cpu().to(dtype).view(torch.uint8).numpy())
    return digest.hexdigest()
