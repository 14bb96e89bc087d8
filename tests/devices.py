"""
A stand-in for a GPU, which keeps numbers on the CPU and refuses what a GPU would refuse.

Under [`StandIn`] a tensor that is moved to `DEVICE`, or made there, is marked, and so is what is computed from it.
Sums have the order that they have on a CPU, so results must be the same bit for bit.
"""

import sys
from collections import Counter
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map


DEVICE, CPU = torch.device("cuda"), torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor that is said to be on `DEVICE`."""


class StandIn(TorchFunctionMode):
    """
    While entered, `DEVICE` is there.

    Args:
        broken: The function in which nothing moves.

    Attributes:
        seen: How often functions have got tensors there.
        moved: How often functions of ours have moved a tensor, or would have.
    """

    def __init__(self, broken: str = " "):
        super().__init__()
        self.broken, self.seen, self.moved = broken, Counter[str](), Counter[str]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or func.__name__).replace("Tensor.", "").removeprefix("torch.")
        # What a tensor is moved to takes no part in the move.
        tensors = list(tensors_in(args[:1] if name == "to" else (*args, *(kwargs or {}).values())))
        is_here = [isinstance(each, OnDevice) for each in tensors]
        if name == "device.__get__" and any(is_here):
            return DEVICE
        with torch._C.DisableTorchFunctionSubclass():
            device, *rest = without_device(name, args, kwargs or {})
            if not any(is_here) and device != DEVICE:
                return func(*args, **(kwargs or {}))
            args, kwargs = rest
            if device is not None and tensors and device != (DEVICE if is_here[0] else CPU):
                caller = sys._getframe(1).f_code.co_qualname
                self.moved[caller] += 1
                device = None if caller.startswith(self.broken) else device
            if any(is_here) and device is None:
                if any(each.dim() for each, here in zip(tensors, is_here, strict=True) if not here):
                    raise RuntimeError(f"{name} got tensors on two devices")
                if name == "numpy":
                    raise TypeError("a tensor on a device has no numpy")
            kind = torch.Tensor if (device or (DEVICE if any(is_here) else CPU)) == CPU else OnDevice
            result = func(*args, **kwargs)
        if any(is_here):
            self.seen[name.removeprefix("linalg.")] += 1
        return placed(result, kind)


def tensors_in(arguments) -> Iterator[torch.Tensor]:
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)


def placed(result, kind: type):
    """The result of a function with its tensors of one kind; those that are it already are the same objects."""

    def place(each):
        is_there = not isinstance(each, torch.Tensor) or isinstance(each, OnDevice) == (kind is OnDevice)
        return each if is_there else each.as_subclass(kind)

    return tree_map(place, result) if isinstance(result, list | tuple) else place(result)


def without_device(name: str, args: tuple, kwargs: dict) -> tuple:
    """The device that a call asks for, if any, and its arguments without it."""
    if name == "cpu":
        return CPU, args, kwargs
    device, kwargs = kwargs.get("device"), {key: value for key, value in kwargs.items() if key != "device"}
    if name == "to":
        rest = []
        for each in args[1:]:
            if isinstance(each, torch.Tensor):
                device = DEVICE if isinstance(each, OnDevice) else CPU
            elif isinstance(each, str | torch.device):
                device = each
            rest += [each.dtype] if isinstance(each, torch.Tensor) else [each] if isinstance(each, torch.dtype) else []
        args = (args[0], *rest)
    return device and torch.device(device), args, kwargs
