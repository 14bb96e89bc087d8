"""Nested training state as tensors and JSON in one safetensors file: optimizers, schedulers, random generators."""

import json
import math
import random
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


# What safetensors both writes and reads.
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
# Schedulers keep their milestones in a `Counter`, older state dicts are ordered.
MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def flatten_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """
    Split a nested state into its tensors and a JSON skeleton of the rest.

    Args:
        state: Any nesting of dicts (also `OrderedDict` and `Counter`) with keys that are strings or integers, lists,
            tuples, tensors, numbers, booleans, strings and `None`, such as `optimizer.state_dict()`.

    Returns:
        `tuple[dict[str, torch.Tensor], Any]`: contiguous copies of the tensors on the CPU, named by the place each has
        in `state`, and what `json.dumps` takes. A tensor that occurs twice is copied twice.

    Raises:
        ValueError: if anything else is in `state`; it names where.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _encode(state, "state", tensors)


def restore_state(tensors: dict[str, torch.Tensor], skeleton: Any) -> Any:
    """
    The inverse of `flatten_state`: the same types, and the same bits in every number and tensor.

    Args:
        tensors (`dict[str, torch.Tensor]`): by the names that `flatten_state` gave.
        skeleton: What `flatten_state` gave, also after a way through JSON.

    Raises:
        ValueError: if a tensor is missing, or one has no place.
    """
    used: set[str] = set()
    state = _decode(skeleton, tensors, used)
    if unused := sorted(tensors.keys() - used):
        raise ValueError(
            f"`tensors` must all have a place in `skeleton`, got {len(unused)} without, such as {unused[0]!r}. Take "
            "both from the same state."
        )
    return state


def save_state(state: Any, path_stem: Path | str) -> Path:
    """
    Write a nested state to `<path_stem>.safetensors`, its skeleton in the metadata.

    Args:
        state: What `flatten_state` takes.
        path_stem (`Path` or `str`): where to, without the ending.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if `state` holds anything that `flatten_state` does not take.
        SafetensorError: if the file cannot be written, as on a full disk; `CheckpointStore.save` explains it.
    """
    tensors, skeleton = flatten_state(state)
    path = Path(f"{path_stem}.safetensors")
    save_file(tensors, path, metadata={"skeleton": json.dumps(skeleton)})
    return path


def load_state(path: Path | str) -> Any:
    """
    Read what `save_state` wrote; tensors are on the CPU, in memory of their own.

    Raises:
        ValueError: if the file is absent, damaged, or was not written by `save_state`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # As mapped from the file, tensors lie at any address, and matrix products of some libraries depend on
            # the alignment in the last bit: a resumed run would drift from the one that was killed.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            skeleton = json.loads((file.metadata() or {})["skeleton"])
        return restore_state(tensors, skeleton)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = "no skeleton in its metadata" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"`path` must be a whole file written by `save_state`, got {str(path)!r}: {reason.rstrip('.')}. Resume "
            "from an earlier checkpoint."
        ) from error


def rng_state() -> dict[str, Any]:
    """
    The states of the random generators of Python, NumPy (the global one), PyTorch and every GPU in use.

    Returns:
        `dict[str, Any]`: for `set_rng_state`; of tensors and numbers, as `flatten_state` takes it. GPUs that this
        process has not used are left out, so that a run on the CPU starts none.
    """
    version, keys, gauss_next = random.getstate()
    _, numpy_keys, position, has_gauss, cached = np.random.get_state()
    on_gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": {"version": version, "keys": torch.tensor(keys, dtype=torch.int64), "gauss_next": gauss_next},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpus else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """
    Set the random generators to what `rng_state` gave.

    Args:
        state (`dict[str, Any]`): with an empty list under "cuda", generators of GPUs are left as they are.

    Raises:
        ValueError: if the state is of another number of GPUs than there are.
    """
    count = torch.cuda.device_count()
    if state["cuda"] and len(state["cuda"]) != count:
        raise ValueError(
            f"`state` must be of as many GPUs as there are here ({count}), got {len(state['cuda'])}. Make as many "
            "visible as the run was started with, or give an empty list for `cuda` to go on with other random numbers."
        )
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["keys"].tolist()), python["gauss_next"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON of `value`, which lies at `where`; its tensors go into `tensors`."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        # JSON has neither infinities nor the bits of a NaN.
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind in (list, tuple):
        items = [_encode(item, f"{where}[{index}]", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if MAPPINGS.get(kind.__name__) is kind:
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(
                    f"`state` must have strings and integers for keys, got {key!r} ({type(key).__name__}) in {where}. "
                    "Rename it before saving."
                )
        return {kind.__name__: [[key, _encode(item, f"{where}[{key!r}]", tensors)] for key, item in value.items()]}
    if kind in (torch.Tensor, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_meta or value.dtype not in DTYPES:
            raise ValueError(
                f"`state` must have dense tensors of types that safetensors keeps, got {value.dtype} "
                f"({value.layout}, {value.device}) at {where}. Convert it before saving."
            )
        tensors[where] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": where}
    raise ValueError(
        "`state` must be of dicts, lists, tuples, tensors, numbers, booleans, strings and None, got "
        f"{kind.__module__}.{kind.__qualname__} at {where}. Turn it into one of these before saving."
    )


def _decode(node: Any, tensors: dict[str, torch.Tensor], used: set[str]) -> Any:
    """What `_encode` made `node` from; adds the tensors it takes to `used`."""
    if isinstance(node, list):
        return [_decode(item, tensors, used) for item in node]
    if not isinstance(node, dict):
        return node
    [(mark, content)] = node.items()
    if mark == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if mark == "tuple":
        return tuple(_decode(item, tensors, used) for item in content)
    if mark in MAPPINGS:
        return MAPPINGS[mark]({key: _decode(item, tensors, used) for key, item in content})
    if content not in tensors:
        raise ValueError(f"`tensors` must have all that `skeleton` names, but {content!r} is missing.")
    used.add(content)
    return tensors[content]
