"""Models and optimizers on one process or many: wrapping them, and gathering and restoring what they hold by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rigpt_hf.optim import full_tensor, shard_like, unwrapped_name

from .options import RunOptions


if TYPE_CHECKING:  # cards read records of runs without it
    from accelerate import Accelerator


# What is in errors of collectives; Gloo raises no class of its own, nor does it always give its name.
BACKENDS = re.compile(r"\b(gloo|nccl|pair closure|connection (closed|reset)|timed out waiting)\b", re.IGNORECASE)


def check_processes(run: RunOptions, world: int) -> None:
    """
    Raise if options of a run do not fit the number of processes or the machine.

    Raises:
        ValueError: says which.
    """
    if run.global_batch_size % world:
        raise ValueError(
            f"`global_batch_size` must be a multiple of the number of processes, got {run.global_batch_size} and "
            f"{world}."
        )
    if run.fsdp and world == 1:
        raise ValueError("`fsdp` shards among processes, got one. Start more with torchrun or accelerate launch.")
    if run.fsdp and run.mixed_precision == "fp16":
        raise ValueError("`mixed_precision` must be `no` or `bf16` with `fsdp`, got `fp16`.")


@contextmanager
def answering(folder: Path) -> Iterator[None]:
    """
    For the work of several processes on what is in a folder.

    Raises:
        ValueError: in the place of what the backends say of a process that has ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not BACKENDS.search(str(error)):
            raise
        reason = " ".join(str(error).split("] ")[-1].split()).partition(". ")[0][:120]
        raise ValueError(
            f"Another process of the run has ended or does not answer ({reason}). The checkpoints in "
            f"{str(folder)!r} are untouched: end what is left of the run, and call the same command again."
        ) from error


def shard(model: nn.Module, precision: str, mesh: DeviceMesh | None = None) -> nn.Module:
    """
    FSDP2: every layer by itself, then what is left.

    Args:
        model: A model with its layers in `model.model.layers` or `model.transformer.h`.
        precision: `"bf16"` computes in bfloat16; master weights and reductions stay in float32.
        mesh: Of the processes, with two axes for replicas of shards; all of them if not given.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    if mesh is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = torch.distributed.init_device_mesh(device, (torch.distributed.get_world_size(),))
    inner: Any = getattr(model, "model", None) or model.transformer
    for layer in getattr(inner, "layers", None) or inner.h:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def local_gradients(accelerator: "Accelerator", model: nn.Module, last: bool) -> Iterator[None]:
    """Backward passes inside leave gradients on their process, unless it is the `last` of a step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        yield
        return
    with nullcontext() if last else accelerator.no_sync(model):
        yield


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under the names they have without wrappers."""
    return {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers as wholes on the CPU; every process must call this."""
    state = {unwrapped_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: full_tensor(tensor.detach()).cpu() for name, tensor in state.items()}


@torch.no_grad()
def restore_weights_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """
    Put back what `gather_weights` gave, of which files may hold tied tensors once.

    Raises:
        ValueError: if a parameter is absent or has another shape.
    """
    parameters = parameters_by_name(model)
    check_fit({name: tuple(tensor.shape) for name, tensor in weights.items()}, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(shard_like(weights[name].to(parameter.device), parameter))


def check_fit(shapes: dict[str, tuple[int, ...]], parameters: dict[str, nn.Parameter]) -> None:
    """A `ValueError` if saved tensors of these shapes are not those of all parameters."""
    for name, parameter in parameters.items():
        if shapes.get(name) != tuple(parameter.shape):
            raise ValueError(
                f"`weights` must fit the model, got {shapes.get(name, 'nothing')} for {name!r} of shape "
                f"{tuple(parameter.shape)}. Resume with the options that the run began with."
            )


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """An optimizer's state by name of parameter, as wholes on the CPU; every process must call this."""
    return {
        name: {
            key: full_tensor(value).detach().cpu() if isinstance(value, torch.Tensor) else value
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in parameters_by_name(model).items()
        if parameter in optimizer.state
    }


@torch.no_grad()
def restore_optimizer_(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Put back what `gather_optimizer` gave, whatever number of processes gave it."""
    for name, parameter in parameters_by_name(model).items():
        if name in state:
            optimizer.state[parameter] = {
                key: _placed(value, parameter) if isinstance(value, torch.Tensor) else value
                for key, value in state[name].items()
            }


def _placed(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A tensor of an optimizer's state on its parameter's device, and sharded as it is if it has its rows."""
    value = value.to(parameter.device)
    return shard_like(value, parameter, keep_dtype=True) if is_sharded_like(value.shape, parameter) else value


def is_sharded_like(shape: tuple[int, ...], parameter: nn.Parameter) -> bool:
    """Whether a tensor of an optimizer's state has its parameter's rows, and lies where they lie."""
    return shape == parameter.shape or (len(shape) == parameter.dim() == 2 and shape[0] == parameter.shape[0])
