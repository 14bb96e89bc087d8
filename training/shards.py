"""States that lie in shards: each process writes its own as safetensors, any number of processes reads them back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, zeros

from rigpt_hf.checkpoints.companions import save_config
from rigpt_hf.checkpoints.weights import check_finite, check_made
from rigpt_hf.checkpoints.write import Entry, split_into_shards, write_index, write_shards
from rigpt_hf.optim import full_tensor, unwrapped_name

from .averaging import AVERAGE
from .sharding import check_fit, is_sharded_like, parameters_by_name


# What stands before the names of weights, and of entries of an optimizer's state.
WEIGHT, MOMENT = "weight/", "optimizer/"
SLOWER = "Go on from the last checkpoint with a lower one, and `allow_changes=True`."


def local_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Weights, saved buffers and moments as this process has them, by the names they have in files; and what else the
    optimizer has on record, by parameter.
    """
    # The first, as it is what has FSDP2 give up whole parameters, which evaluation leaves behind.
    saved = {unwrapped_name(name): tensor for name, tensor in model.state_dict().items()}
    parameters = parameters_by_name(model)
    known = {unwrapped_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in saved.items() if name not in known}
    tensors = {WEIGHT + name: tensor.detach() for name, tensor in (parameters | buffers).items()}
    others: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{MOMENT}{name}/{key}"] = _settled(value.detach())
            else:
                others.setdefault(name, {})[key] = value
    return tensors, others


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose numbers are there: the terms of a sum, one on each process, are not."""
    is_sum = isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements)
    return full_tensor(tensor) if is_sum else tensor


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """
    A file of each process: its shards, and its share of what all have; every process of a group calls this.

    Raises:
        Exception: on all processes what one of them met with, such as an `OSError` on a full disk.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _one_failure(group):
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


class StoredShards:
    """
    Tensors that `save_shards` wrote, by whatever number of processes.

    Args:
        folder (`Path`): Of the files; what they hold is not read before it is asked for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
        self.shapes = {name: tuple(entry.size) for name, entry in stored.state_dict_metadata.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in stored.state_dict_metadata.items()}
        self._files: dict[str, dict[tuple[int, ...], str]] = {}
        for index, place in stored.storage_data.items():
            self._files.setdefault(index.fqn, {})[tuple(index.offset)] = place.relative_path

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from the files."""
        result = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        for offset, file in self._files[name].items():
            with safe_open(file, framework="pt") as opened:
                part = opened.get_tensor(name)
            result[tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))] = part
        return result

    def write(self, model: Any, folder: Path) -> None:
        """
        Write the weights as `save_pretrained` would, a file at a time, each tensor read when its turn comes.

        Args:
            model: Gives configuration and code; its own weights are not looked at.
            folder: Exists; of weights in float32, as training has them.
        """

        def make(name: str, dtype: torch.dtype) -> torch.Tensor:
            tensor = self.read(WEIGHT + name)
            check_made({name: tensor}, "learning_rate", SLOWER)
            return tensor.to(dtype)

        names = sorted(name.removeprefix(WEIGHT) for name in self.shapes if name.startswith(WEIGHT))
        entries = [Entry(name, self.shapes[WEIGHT + name], partial(make, name)) for name in names]
        files = split_into_shards(entries, torch.float32, None)
        write_shards(files, folder, torch.float32, None, str(self.folder))
        write_index(files, folder, torch.float32)
        save_config(model.config, type(model), folder, torch.float32)
        model.generation_config.save_pretrained(folder)

    def restore_weights_(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        """Put the weights that training goes on from into a model, of which each process reads its own part."""
        parameters = parameters_by_name(model)
        named = {name: self._weights_of(name) for name in parameters}
        check_fit({name: self.shapes[stored] for name, stored in named.items() if stored in self.shapes}, parameters)
        self._load_({stored: parameters[name].detach() for name, stored in named.items()}, group)
        for name, parameter in parameters.items():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            check_finite(name, local.detach(), str(self.folder))

    def restore_moments_(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        others: dict[str, dict[str, Any]],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Put back the moments, and the other entries that `local_state` gave."""
        targets = {}
        for name, parameter in parameters_by_name(model).items():
            start, state = f"{MOMENT}{name}/", dict(others.get(name, {}))
            for stored in [stored for stored in self.shapes if stored.startswith(start)]:
                key = stored.removeprefix(start)
                state[key] = self._place_for(stored, parameter)
                # An average and the weights that it is of have changed places: see `WeightAverage.applied`.
                targets[WEIGHT + name if key == AVERAGE else stored] = state[key]
            if state:
                optimizer.state[parameter] = state
        self._load_(targets, group)

    def _weights_of(self, name: str) -> str:
        average = f"{MOMENT}{name}/{AVERAGE}"
        return average if average in self.shapes else WEIGHT + name

    def _place_for(self, stored: str, parameter: nn.Parameter) -> torch.Tensor:
        shape, dtype = self.shapes[stored], self.dtypes[stored]
        if isinstance(parameter, DTensor) and is_sharded_like(shape, parameter):
            return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    def _load_(self, targets: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
        reader = dcp.HuggingFaceStorageReader(str(self.folder))
        with _one_failure(group):
            dcp.load(targets, storage_reader=reader, process_group=group, no_dist=group is None)


@contextmanager
def _one_failure(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turns the failures of several processes, which the library has in one with their traces, into the first."""
    try:
        with warnings.catch_warnings() if group is None else nullcontext():
            if group is None:  # which is meant
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        first, _ = error.failures[min(error.failures)]
        raise first from None
