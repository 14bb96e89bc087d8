"""Where stock weights come from: a model in memory, or safetensors files read tensor by tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class WeightSource(Protocol):
    """Named tensors; `part` reads the k-th of n equal slices along a dimension without the rest."""

    def keys(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, part: tuple[int, int] = (0, 1), dim: int = 0) -> torch.Tensor: ...


def slice_bounds(size: int, part: tuple[int, int], name: str) -> tuple[int, int]:
    """Start and end of the k-th of n equal parts of `size`."""
    index, count = part
    if size % count:
        raise ValueError(f"`{name}` must be made of {count} equal parts, got size {size}. The checkpoint is damaged.")
    return index * size // count, (index + 1) * size // count


class StateDictSource:
    """The tensors of a model in memory."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]):
        self.state_dict = state_dict

    def keys(self) -> set[str]:
        return set(self.state_dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state_dict[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.state_dict[name].dtype

    def read(self, name: str, part: tuple[int, int] = (0, 1), dim: int = 0) -> torch.Tensor:
        tensor = self.state_dict[name].detach()
        start, end = slice_bounds(tensor.shape[dim], part, name)
        return tensor.narrow(dim, start, end - start)


class SafetensorsSource:
    """
    The tensors of a folder of safetensors, each read when asked for.

    Files are read with `pread`, not mapped: mapped pages stay resident and would count towards the peak of memory.

    Args:
        folder (`Path`): holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        device (`str`, defaults to `"cpu"`): where tensors are put.

    Raises:
        ValueError: if the folder holds no safetensors, or the index and the shards disagree.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        self.device = device
        if (folder / INDEX_NAME).is_file():
            weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        elif (folder / SINGLE_NAME).is_file():
            weight_map, files = None, [SINGLE_NAME]
        else:
            raise ValueError(
                f"`source` must be a folder with `{SINGLE_NAME}` or `{INDEX_NAME}`, got {str(folder)!r}, which has "
                "neither. Older formats: load the model with `from_pretrained` and use `convert_model`, or save it "
                "once more with `save_pretrained`."
            )
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            if not (folder / file).is_file():
                raise ValueError(f"`{INDEX_NAME}` names the shard {file!r}, which is missing. Download it again.")
            self._scan(folder / file)
        if weight_map is not None and set(weight_map) != set(self._files):
            odd = sorted(set(weight_map) ^ set(self._files))
            raise ValueError(f"`{INDEX_NAME}` and its shards disagree about {odd[0]!r}. Download them again.")
        self._open_path: Path | None = None

    def _scan(self, path: Path) -> None:
        """Names, shapes and dtypes from the header: a length (8 bytes, little-endian), then that much JSON."""
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"`{name}` is stored as {entry['dtype']}; weights must be one of {', '.join(DTYPES)} to be "
                    "folded. Start from a checkpoint that is not quantized."
                )
            self._files[name], self._shapes[name] = path, tuple(entry["shape"])
            self._dtypes[name] = DTYPES[entry["dtype"]]

    def keys(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, part: tuple[int, int] = (0, 1), dim: int = 0) -> torch.Tensor:
        if self._open_path != self._files[name]:  # one open file at a time, however many shards there are
            self._open_path = self._files[name]
            self._handle = safe_open(self._open_path, framework="pt", backend="pread")
        if part == (0, 1):
            return self._handle.get_tensor(name).to(self.device)
        start, end = slice_bounds(self._shapes[name][dim], part, name)
        where = (slice(None),) * dim + (slice(start, end),)
        return self._handle.get_slice(name)[where].to(self.device)


# What safetensors calls the dtypes that hold weights (masks in old GPT-2 files are U8 or BOOL).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
