"""The precision in which a model computes while it is compared with another."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def in_own_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """
    Let a float64 model compute in float64.

    The library's norms, and some of its rotations, round to float32 on the way, whatever the dtype of the model: 1e-7
    of noise, which would hide everything a float64 certificate is there to see. Other dtypes are left as they are, and
    so are buffers: frequencies are of float32 in every model, and a certificate compares models with the same. Cosines
    and sines of these angles are of float64: rounded, they would stretch vectors by 1e-8, which a norm behind sees.
    So are those in the tables that some classes keep (GPT-J's), which have other angles in other dtypes, and products
    of slopes and positions; and a GELU has all digits of `sqrt(2/pi)`, of which BLOOM's has eight.
    """
    return _OwnPrecision(model) if getattr(model, "dtype", None) is torch.float64 else nullcontext()


# What the library calls a table of sines and cosines of all positions that is a buffer.
TABLE = "embed_positions"
# What it calls the way in which experts are computed, of which only the plain one knows float64.
EXPERTS = "_experts_implementation"


# And what one of its classes writes in place of the square root of 2/pi.
ROUNDED_ROOT = 0.79788456


class _OwnPrecision(TorchFunctionMode):
    """Casts of float64 to float32 do nothing, but for those of a model's buffers; no angle is rounded once more."""

    ANGLES = (torch.Tensor.cos, torch.Tensor.sin, torch.cos, torch.sin)
    PRODUCTS = (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
    CASTS = (torch.Tensor.float, torch.Tensor.to, nn.functional.softmax)

    def __init__(self, model: nn.Module):
        super().__init__()
        self.kept = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
        self.config = getattr(model, "config", None)
        self.experts = getattr(self.config, EXPERTS, None)
        self.tables = [(module, module._buffers[TABLE]) for module in model.modules() if TABLE in module._buffers]

    def __enter__(self) -> "_OwnPrecision":
        super().__enter__()
        if self.experts is not None:
            setattr(self.config, EXPERTS, "eager")
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # in which the frequencies are
        try:
            for module, table in self.tables:
                make = sys.modules[type(module).__module__].create_sinusoidal_positions
                module._buffers[TABLE] = make(module.max_positions, module.pos_embd_dim).to(table.device)
        finally:
            torch.set_default_dtype(default)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.experts is not None:
            setattr(self.config, EXPERTS, self.experts)
        for module, table in self.tables:
            module._buffers[TABLE] = table
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.ANGLES and args[0].dtype is torch.float32:
            args = (args[0].to(torch.float64),)
        if function in self.PRODUCTS and len(args) == 2:
            args = self._exact_factors(*args)
        if function in self.CASTS and args and args[0].dtype is torch.float64 and not self._is_kept(args[0]):
            if function is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    @staticmethod
    def _exact_factors(*factors: Any) -> tuple[Any, ...]:
        """Slopes in float64 beside whole numbers, which are positions, and the root of 2/pi with all of its digits."""
        whole = [isinstance(each, torch.Tensor) and not each.is_floating_point() for each in factors]
        exact = []
        for factor in factors:
            if any(whole) and isinstance(factor, torch.Tensor) and factor.dtype is torch.float32:
                factor = factor.to(torch.float64)
            exact.append(math.sqrt(2 / math.pi) if isinstance(factor, float) and factor == ROUNDED_ROOT else factor)
        return tuple(exact)

    def _is_kept(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.kept
