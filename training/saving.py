"""The state of a run: taken as it is at one moment, written by all processes, and put back."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from rigpt_hf.checkpoints.folder import check_output
from rigpt_hf.checkpoints.read import load_config, load_skeleton
from rigpt_hf.checkpoints.weights import check_finite
from rigpt_hf.symmetry.tokens import SymmetricTraining

from .averaging import WeightAverage, exchange_saved
from .checkpoints import Checkpoint, Write
from .records import write_model
from .sharding import gather_optimizer, gather_weights, restore_optimizer_, restore_weights_
from .shards import StoredShards, local_state, save_shards
from .state import load_state, rng_state, save_state, set_rng_state


logger = logging.get_logger(__name__)
# In a checkpoint: the folder of what lies in shards, that of a whole model, and all that is neither.
SHARDS, MODEL, STATE = "shards", "model", "optimizer.pt"


class GroupWorkers:
    """
    The processes of a run, in a group of their own, in which saving disturbs nothing that training sends.

    Args:
        timeout (`timedelta`, *optional*): How long one waits for another.
    """

    def __init__(self, timeout: timedelta | None = None):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self.index: int = dist.get_rank() if several else 0
        self.count: int = dist.get_world_size() if several else 1

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.count
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values


class Background:
    """Saves one after the other, beside the training or, unless `asynchronous`, before it goes on."""

    def __init__(self, asynchronous: bool):
        self.thread = ThreadPoolExecutor(1, "saving") if asynchronous else None
        self.pending: Future | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save has come to nothing; `wait` says why."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def start(self, save: Callable[[], Any]) -> None:
        """Save once the save before is done; raises what that one met with."""
        self.wait()
        if self.thread is None:
            save()
        else:
            self.pending = self.thread.submit(save)

    def wait(self) -> None:
        """Wait for the last save, and raise what it met with."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


class TrainingState:
    """
    All that the numbers of the next steps depend on.

    Args:
        plain: The model without what is wrapped around it.
        model, optimizer, symmetric, average, scaler: Those of the run.
        optim (`str`): The name of the optimizer.
        workers (`GroupWorkers`): The processes of the run.
        sharded (`bool`): Whether each process writes what it holds; else the main one writes the whole model.
    """

    def __init__(
        self,
        plain: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        symmetric: SymmetricTraining,
        average: WeightAverage,
        scaler: Any,
        optim: str,
        workers: GroupWorkers,
        sharded: bool,
    ):
        self.plain, self.model, self.optimizer, self.symmetric = plain, model, optimizer, symmetric
        self.average, self.scaler, self.optim = average, scaler, optim
        self.workers, self.sharded = workers, sharded

    @contextmanager
    def taken(self, apart: bool) -> Iterator[Write]:
        """
        A function that writes this process's part of the state into a folder.

        Args:
            apart (`bool`): Of a copy of the state as it is now; else what it writes is right only inside.
        """
        random = rng_state()
        state: dict[str, Any] = {"name": self.optim, "scaler": self.scaler.state_dict() if self.scaler else {}}
        # `model` of a checkpoint is the one that was judged: an average goes there, and the weights to its place.
        with self.average.applied():
            tensors: dict[str, torch.Tensor] = {}
            weights: dict[str, torch.Tensor] = {}
            if self.sharded:
                tensors, state["optimizer"] = local_state(self.model, self.optimizer)
            else:
                weights, state["optimizer"] = gather_weights(self.model), gather_optimizer(self.model, self.optimizer)
            if apart:
                # Shards stay shards; all else is on the CPU already, and tied weights stay tied.
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                weights, state = copy.deepcopy(weights), copy.deepcopy(state)

            def write(folder: Path) -> None:
                # First what all do together: whoever fails alone before it would leave the others waiting there.
                if self.sharded:
                    save_shards(tensors, folder / SHARDS, self.workers.group)
                save_state(random, folder / f"rng-{self.workers.index}.pt")
                if self.workers.index == 0:
                    if self.sharded:
                        self.plain.config.save_pretrained(folder / MODEL)
                    else:
                        write_model(self.plain, weights, None, folder / MODEL, {})
                    save_state(state, folder / STATE)

            yield write

    def restore_(self, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds, whether it was written in shards or not."""
        state = load_state(checkpoint.path / STATE)
        shards = stored_weights(checkpoint)
        if shards is not None:
            shards.restore_weights_(self.model, self.workers.group)
        else:
            # Not mapped from the file: see `load_state`.
            mapped = load_file(checkpoint.path / MODEL / "model.safetensors")
            weights = {name: tensor.clone() for name, tensor in mapped.items()}
            for name, tensor in weights.items():
                check_finite(name, tensor, str(checkpoint.path))
            if checkpoint.facts.get("averaged"):
                exchange_saved(weights, state["optimizer"])
            restore_weights_(self.model, weights)
        if not self.symmetric.resume_(load_config(checkpoint.path / MODEL), self.optimizer):
            logger.warning("The symmetry was another one before: weights are brought to it, and moments start afresh.")
        elif state["name"] != self.optim:
            logger.warning(f"The optimizer was {state['name']!r} before: its moments are of no use and start afresh.")
        elif shards is not None:
            shards.restore_moments_(self.model, self.optimizer, state["optimizer"], self.workers.group)
        else:
            restore_optimizer_(self.model, self.optimizer, state["optimizer"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if checkpoint.facts["world"] == self.workers.count:
            set_rng_state(load_state(checkpoint.path / f"rng-{self.workers.index}.pt"))
        else:
            logger.warning(
                f"Saved by {checkpoint.facts['world']} processes, continued by {self.workers.count}: dropout differs."
            )


def stored_weights(checkpoint: Checkpoint | None) -> StoredShards | None:
    """The weights of a checkpoint that was written in shards; `None` of another one."""
    folder = None if checkpoint is None else checkpoint.path / SHARDS
    return StoredShards(folder) if folder is not None and folder.is_dir() else None


def export_checkpoint(checkpoint: Path | str, output: Path | str, force: bool = False) -> None:
    """
    The model of a checkpoint in shards, such as the best one, as a folder that `AutoModelForCausalLM` loads.

    Args:
        checkpoint: A folder `step-00001000` of a run with `--fsdp`.
        output, force: Where to; `force` replaces an earlier model there.

    Raises:
        ValueError: if the checkpoint is damaged or not in shards, or something else is in the way.
    """
    read, seen = Checkpoint.read(Path(checkpoint)), check_output(Path(output), None, force=force)
    read.verify()
    weights = stored_weights(read)
    if weights is None:
        raise ValueError(
            f"`checkpoint` must be one in shards, got {str(checkpoint)!r}. Its folder `{MODEL}` loads as it is."
        )
    write_model(load_skeleton(read.path / MODEL), weights, None, Path(output), seen)
