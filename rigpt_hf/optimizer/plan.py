"""Bytes and messages of a training step on shards, for any number of processes, without starting one."""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .dealing import Layout, Part, Round, boxes_of, numel, rounds_of, shape_of
from .polar import STEPS, newton_schulz_in


@dataclass(frozen=True)
class ProcessPlan:
    """
    Bytes that one process holds and sends.

    Args:
        weights, gradients: Of its shards.
        momenta: Momentum of matrices and first moments of the rest.
        second_moments: Adam's, shared within rows and vectors.
        transient: The most that the polar factors of a step hold at once, besides all of that.
        sent, received: By the polar factors, per step.
        messages: How many pieces that goes out in, one to a process at a time.
        collectives: Calls of all-to-all, per step.
    """

    weights: int
    gradients: int
    momenta: int
    second_moments: int
    transient: int
    sent: int
    received: int
    messages: int
    collectives: int


def plan(
    groups: Sequence[dict[str, Any]],
    shards: int,
    replicas: int = 1,
    *,
    sent: torch.dtype = torch.bfloat16,
    computed: torch.dtype = torch.bfloat16,
    steps: int = STEPS,
) -> list[ProcessPlan]:
    """
    The plan of every process under FSDP2, or HSDP with `replicas` of all shards.

    Args:
        groups: From `equivariant_param_groups`, of whole parameters, which may be on the device `meta`.
        shards, replicas: The mesh.
        sent, computed: The types in which matrices are sent and polar factors are computed: as here on a GPU, that of
            the weights and float32 on a CPU.
        steps: Iterations of Newton–Schulz.
    """
    mesh, cuts = ((replicas, shards), ((1, 0),)) if replicas > 1 else ((shards,), ((0, 0),))
    processes = tuple(range(prod(mesh)))
    held = [dict.fromkeys(("weights", "gradients", "momenta", "second_moments"), 0) for _ in processes]
    layouts: list[Layout] = []
    for group in groups:
        for parameter in group["params"]:
            rows, *rest = parameter.shape or (1,)
            flat = Layout((rows, prod(rest)), 1, 0, mesh, cuts)
            if group["update_rule"] == "polar":
                layouts.append(flat._replace(blocks=group["blocks"], dim=group["dim"]))
            for total, box in zip(held, boxes_of(flat), strict=True):
                size = numel(box) * parameter.element_size()
                moments = {"polar": 0, "rows": shape_of(box)[0], "vectors": group["blocks"]}
                count = moments.get(group["update_rule"], numel(box))
                for name in ("weights", "gradients", "momenta"):
                    total[name] += size
                total["second_moments"] += count * parameter.element_size()
    # What a box of the shards is worked on in.
    kept = max((parameter.element_size() for group in groups for parameter in group["params"]), default=0)
    plans = []
    for process, rounds in rounds_of(tuple(layouts), processes).items():
        transient = max((_transient(turn, process, sent, computed, kept, steps) for turn in rounds), default=0)
        exchanges = [
            (out, [part for part in into if part.peer != process])
            for turn in rounds
            for out, into, happens in ((turn.given, turn.taken, turn.gathers), *turn.waves)
            if happens
        ]
        plans.append(
            ProcessPlan(
                **held[process],
                transient=transient,
                sent=sum(_numel(out) for out, _ in exchanges) * sent.itemsize,
                received=sum(_numel(into) for _, into in exchanges) * sent.itemsize,
                messages=sum(len({part.peer for part in out}) for out, _ in exchanges),
                collectives=len(exchanges),
            )
        )
    return plans


def _transient(turn: Round, process: int, sent: torch.dtype, computed: torch.dtype, kept: int, steps: int) -> int:
    """The most bytes at once in a round, phase by phase as `map_blocks` goes through them."""

    def foreign(parts: Sequence[Part]) -> int:
        return _numel([part for part in parts if part.peer != process]) * sent.itemsize

    def largest(parts: Sequence[Part]) -> int:
        return max((numel(part.box) for part in parts), default=0) * kept

    counts = Counter(shape_of(box) for _, box in turn.blocks)
    stacks = sum(numel(box) for _, box in turn.blocks) * sent.itemsize
    taken = foreign(turn.taken)
    own = largest([part for part in turn.taken if part.peer == process])
    phases = [foreign(turn.given) + taken + largest(turn.given), taken + stacks + own]
    phases += [stacks + workspace(count, *shape, sent, computed, steps) for shape, count in counts.items()]
    for wave in turn.waves:
        received = foreign(wave.received)
        # The factor's part, its update, and both in the type of the weights.
        phases += [stacks + foreign(wave.returned) + received, stacks + received + 2 * largest(wave.received)]
    return max(phases)


@cache
def workspace(count: int, rows: int, columns: int, sent: torch.dtype, computed: torch.dtype, steps: int) -> int:
    """The most bytes that polar factors of a stack of matrices hold besides it, as the operations themselves say."""
    stack = torch.empty(count, rows, columns, dtype=sent, device="meta")
    with PeakBytes() as peak:
        newton_schulz_in(stack, steps, computed)
    return peak.most


def _numel(parts: Sequence[Part]) -> int:
    return sum(numel(part.box) for part in parts)


class PeakBytes(TorchDispatchMode):
    """
    The most bytes that tensors made inside held at once; what was there before does not count.

    Attributes:
        most (`int`): so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, tensor.untyped_storage().nbytes())
        return result

    def _see(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._held += size
        self.most = max(self.most, self._held)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size
