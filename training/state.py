"""Training state in files that hold tensors and plain values only: optimizers, gradient scalers, random generators."""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_state(state: Any, path: Path) -> None:
    """
    Write a state by `torch.save`.

    Args:
        state: Any nesting of dicts, lists and tuples of tensors, numbers, strings and `None`.
        path (`Path`): The file.

    Raises:
        ValueError: if anything else is in it, which [`load_state`] would refuse.
        OSError: if it cannot be written, as on a full disk.
    """
    try:
        # By a file of Python's: of one of its own PyTorch says nothing but that it failed.
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        raise ValueError(f"`state` must be of tensors and plain values, got {', '.join(unsafe)}. Leave it out.")


def load_state(path: Path) -> Any:
    """
    Read what [`save_state`] wrote, without running any code in it; tensors are on the CPU, in memory of their own.

    Raises:
        ValueError: if the file is absent or damaged, or holds anything but tensors and plain values.
    """
    try:
        # Not mapped from the file: such tensors lie at any address, and matrix products of some libraries depend on
        # the alignment in the last bit, so that a resumed run would drift from the one that was killed.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        # The library advises to run what is in it.
        reason = "it holds something else" if "weights_only" in str(error) else " ".join(str(error).split())[:200]
        raise ValueError(
            f"`path` must be a whole file of tensors and plain values, got {str(path)!r}: {reason.rstrip('.')}. "
            "Resume from an earlier checkpoint."
        ) from error


def rng_state() -> dict[str, Any]:
    """
    The states of the random generators of Python, NumPy (the global one), PyTorch and every GPU in use, for
    [`set_rng_state`]; GPUs that this process has not used are left out, so that a run on the CPU starts none.
    """
    name, keys, *rest = np.random.get_state()
    on_gpus = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpus else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """
    Set the random generators to what [`rng_state`] gave.

    Args:
        state (`dict[str, Any]`): With an empty list under "cuda", generators of GPUs are left as they are.

    Raises:
        ValueError: if the state is of another number of GPUs than there are.
    """
    count = torch.cuda.device_count()
    if state["cuda"] and len(state["cuda"]) != count:
        raise ValueError(
            f"`state` must be of as many GPUs as there are here ({count}), got {len(state['cuda'])}. Make as many "
            "visible as the run was started with, or give an empty list for `cuda` to go on with other random numbers."
        )
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
