"""Work that all processes of a run would do alike, shared among them instead; and tensors in shards."""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate


def shared_work(
    stacks: Sequence[torch.Tensor],
    function: Callable[[torch.Tensor], torch.Tensor],
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """
    `function` of every stack `[N, m, n]`: each process does its share of the matrices and gets the other shares.

    Args:
        stacks: The same on every process.
        function: Maps a stack to one of the same shape and dtype, each matrix by itself.
        group: The processes; `None`: all of it here.
    """
    world = 1 if group is None else dist.get_world_size(group)
    if world == 1:
        return [function(stack) for stack in stacks]
    owners = assign([tuple(stack.shape) for stack in stacks], world)
    rank = dist.get_rank(group)
    mine = [[index for index, owner in enumerate(row) if owner == rank] for row in owners]
    parts = [function(stack[indices]).flatten() for stack, indices in zip(stacks, mine, strict=True) if indices]
    sizes = [0] * world
    for stack, row in zip(stacks, owners, strict=True):
        for owner in row:
            sizes[owner] += stack[0].numel()
    # One collective for everything: the buffers must be of one length, so the shorter ones are filled up.
    buffer = stacks[0].new_zeros(max(sizes))
    if parts:
        buffer[: sizes[rank]] = torch.cat(parts)
    gathered = [torch.empty_like(buffer) for _ in range(world)]
    dist.all_gather(gathered, buffer, group=group)
    results = [torch.empty_like(stack) for stack in stacks]
    positions = [0] * world
    for stack, result, row in zip(stacks, results, owners, strict=True):
        size = stack[0].numel()
        for index, owner in enumerate(row):
            start = positions[owner]
            result[index] = gathered[owner][start : start + size].reshape(stack.shape[1:])
            positions[owner] += size
    return results


def assign(shapes: Sequence[tuple[int, ...]], world: int) -> list[list[int]]:
    """The process, of `world`, for every matrix of stacks `[N, m, n]`: the costliest first, to the idlest."""
    costs = [
        (shape[-2] * shape[-1] * min(shape[-2:]), stack, index)
        for stack, shape in enumerate(shapes)
        for index in range(shape[0])
    ]
    owners = [[0] * shape[0] for shape in shapes]
    load = [0] * world
    for cost, stack, index in sorted(costs, key=lambda item: (-item[0], item[1], item[2])):
        owner = load.index(min(load))
        owners[stack][index] = owner
        load[owner] += cost
    return owners


def agreeing_group(description: str, device: torch.device) -> dist.ProcessGroup | None:
    """
    The default group, if there is one of several processes and all of them give the same description; else `None`.

    All of them must call this equally often, or it waits for those that do not.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    digest = hashlib.blake2b(description.encode(), digest_size=7).digest()
    number = torch.tensor([int.from_bytes(digest, "big")], dtype=torch.int64, device=device)
    numbers = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, number)
    return dist.group.WORLD if all(torch.equal(number, other) for other in numbers) else None


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has of a parameter: all of it, or its shard."""
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(parameter, DTensor) and tensor.placements != parameter.placements:
        tensor = tensor.redistribute(placements=parameter.placements)
    return tensor.to_local()


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor, keep_dtype: bool = False) -> torch.Tensor:
    """A tensor that is there as a whole, sharded as a parameter is; each process takes its part, nothing is sent."""
    tensor = tensor if keep_dtype else tensor.to(parameter.dtype)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements)
