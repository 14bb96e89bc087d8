"""
Linear maps and tables made of whole numbers and scales, and the kernels that multiply by them.

A weight is `W = c · s · g`: codes `c` of 4 or 8 bits, a scale `s` for each row or for each group of neighbours in a
row, and, where a map has some, factors `g` of its inputs. What is stored is exactly this, whatever kernel runs. Codes
of 4 bits are `c + 8`, two in a byte, the first in the low bits. Kernels have formats of their own, which are made from
the codes when they are first needed and never saved:

    bfloat16 on a CPU    `_weight_int4pack_mm_for_cpu`, and `_weight_int8pack_mm` for 8 bits with a scale for each row
    bfloat16 on a GPU    `_weight_int4pack_mm` (tinygemm) from compute capability 8.0
    all other            the weights behind the codes, made for one product and forgotten, some rows at a time on a CPU

So are products with many rows of inputs, on a GPU and on a CPU that multiplies in bfloat16 by itself.

All are the same function but for the rounding of the dtype: the kernels round scales to it, too.
"""

from functools import cache
from typing import Any

import torch
from torch import nn


GROUPS = (32, 64, 128)
# Sizes of groups, in which kernels of 4 bits take scales; a scale of a whole row is repeated.
KERNEL_GROUPS = (256, 128, 64, 32)
# Bytes; those of the longest registers, and what torch gives its own tensors on a CPU.
ALIGNMENT = 64
# Above so many rows of inputs dense weights multiply quicker than codes: with a CPU's own products of bfloat16 the
# kernel of 4 bits takes 1.4 ms for 64 rows of a 1536 x 576 matrix and the dense way 2.0, for 256 rows 5.4 and 3.7.
DENSE_ROWS = {"cuda": 32, "cpu": 96}
# Numbers that are made of codes at once on a CPU, which its caches hold.
BLOCK = 1 << 17


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[m, n]` as they are stored: int8 for 8 bits, else `c + 8`, two in a byte, `[m, ceil(n / 2)]` of uint8."""
    if bits == 8:
        return codes.to(torch.int8)
    if codes.shape[-1] % 2:
        codes = nn.functional.pad(codes, (0, 1))
    shifted = (codes.to(torch.int8) + 8).view(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def unpack(stored: torch.Tensor, columns: int) -> torch.Tensor:
    """Codes `[m, n]` of int8, from what is stored."""
    if stored.dtype == torch.int8:
        return stored
    pairs = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
    return (pairs[..., :columns] - 8).view(torch.int8)


def spread(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`c · s` `[..., n]`, from codes of this shape and scales `[..., n / group]`; rounded once."""
    accurate = torch.promote_types(dtype, torch.float32)
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).to(accurate)
    return (groups * scales[..., None].to(accurate)).flatten(-2).to(dtype)


class Coded(nn.Module):
    """
    A matrix `[m, n]` of codes and scales.

    Args:
        rows, columns (`int`): m and n.
        bits (`int`): 3, 4 or 8; 3 are stored as 4.
        group (`int`, *optional*): neighbours in a row that share a scale; all of them if not given.
        gain (`bool`): whether inputs have factors.
    """

    def __init__(self, rows: int, columns: int, bits: int, group: int | None = None, gain: bool = False):
        super().__init__()
        self.shape, self.bits, self.group = (rows, columns), bits, group
        form = ((rows, columns), torch.int8) if bits == 8 else ((rows, -(-columns // 2)), torch.uint8)
        self.codes = frozen(*form)
        self.scales = frozen((rows, columns // (group or columns)), torch.float16)
        self.gain = frozen((columns,), torch.float16) if gain else None
        # Codes have no dtype to compute in: this has, and is cast with the model.
        self.register_buffer("like", torch.empty(0), persistent=False)
        self._packed: tuple | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that tables answer in, and weights are shown in."""
        return self.like.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The weights `[m, n]` behind the codes, made for whoever asks."""
        return self.dense(self.dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """`c · s · g` `[m, n]`."""
        return self._with_gain(self.spread(torch.promote_types(dtype, torch.float32))).to(dtype)

    def spread(self, dtype: torch.dtype) -> torch.Tensor:
        """`c · s` `[m, n]`."""
        return spread(unpack(self.codes, self.shape[1]), self.scales, dtype)

    def _with_gain(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.gain is None else values * self.gain.to(values.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As for every module, but what is stored keeps its dtype: half of the digits of a scale would be lost."""
        stored = {id(parameter) for name, parameter in self.named_parameters(recurse=False) if name != "bias"}

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in stored or moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._packed = None
        return super()._apply(placed, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        group = "" if self.group is None else f", group={self.group}"
        return f"{self.shape[1]}, {self.shape[0]}, bits={self.bits}{group}{', gain' * (self.gain is not None)}"


class QuantizedEmbedding(Coded):
    """Rows of a table of codes."""

    def __init__(self, rows: int, columns: int, bits: int, group: int | None = None, gain: bool = False):
        super().__init__(rows, columns, bits, group, gain)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = spread(unpack(self.codes[input_ids], self.shape[1]), self.scales[input_ids], self.dtype)
        return self._with_gain(rows)


class QuantizedLinear(Coded):
    """
    `W x + b`; no `nn.Linear`, whose weight others would read or write.

    Args:
        bias (`bool`): whether there is `b`; the others are those of [`Coded`].
    """

    def __init__(
        self, rows: int, columns: int, bits: int, group: int | None = None, gain: bool = False, bias: bool = False
    ):
        super().__init__(rows, columns, bits, group, gain)
        self.out_features, self.in_features = self.shape
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(kind))
        if self.gain is not None:
            hidden_states = self._with_gain(hidden_states)
        if not (hidden_states.requires_grad and torch.is_grad_enabled()):
            output = self.product(hidden_states)
        elif torch.compiler.is_compiling():
            output = nn.functional.linear(hidden_states, self.spread(hidden_states.dtype))
        else:
            output = _Product.apply(hidden_states, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`c s x` by the quickest kernel that there is; derivatives are another's work."""
        operands = self._kernel(hidden_states)
        if operands is None:
            return self._dense_product(hidden_states)
        kernel, *rest = operands
        output = kernel(hidden_states.reshape(-1, self.in_features).contiguous(), *rest)
        if output.shape[1] != self.out_features:  # kernels take full blocks of rows
            output = output[:, : self.out_features]
        return output.view(*hidden_states.shape[:-1], self.out_features)

    def _dense_product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same by the weights behind the codes."""
        if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            return nn.functional.linear(hidden_states, self.spread(hidden_states.dtype))
        output = hidden_states.new_empty(*hidden_states.shape[:-1], self.out_features)
        height = max(1, BLOCK // self.in_features)
        for part, codes, scales in zip(
            output.split(height, -1), self.codes.split(height), self.scales.split(height), strict=True
        ):
            weight = spread(unpack(codes, self.in_features), scales, hidden_states.dtype)
            part.copy_(nn.functional.linear(hidden_states, weight))
        return output

    def prepare(self) -> None:
        """Make now what the kernel of the module's own dtype and place wants, which a compiler then finds."""
        self._kernel(self.like.new_empty(1, 0))

    def _kernel(self, inputs: torch.Tensor) -> tuple | None:
        """The kernel for these inputs and what it takes besides them; `None` where there is none."""
        if inputs.dtype != torch.bfloat16 or inputs.device.type not in PACKERS:
            return None
        packed = self._packed
        if torch.compiler.is_compiling():
            return None if packed is None else packed[-1]
        codes, scales = self._parameters["codes"], self._parameters["scales"]
        version = codes._version + scales._version
        if packed is None or packed[0] is not codes or packed[1] is not scales or packed[2] != version:
            if codes.is_meta or codes.device != inputs.device:
                return None
            packed = codes, scales, version, PACKERS[codes.device.type](self)
            self._packed = None if _is_elsewhere(self) else packed
        kind = inputs.device.type
        if inputs.numel() > DENSE_ROWS[kind] * self.in_features and (kind == "cuda" or multiplies_bfloat16()):
            return None
        return packed[-1]


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16 of its own; they are told by a private function of torch."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def pack_for_cpu(module: QuantizedLinear) -> tuple | None:
    """The kernel of a CPU for bfloat16, and its operands."""
    rows, columns = module.shape
    scales = module.scales.detach()
    if module.bits == 8:
        # Rows of other lengths are read beyond their ends.
        if module.group is not None or columns % 16:
            return None
        codes = module.codes.detach()
        # As for inputs, see there.
        codes = codes if codes.data_ptr() % ALIGNMENT == 0 else codes.clone()
        return _int8_product, codes, scales[:, 0].to(torch.bfloat16)
    group = _kernel_group(module)
    if group is None:
        return None
    missing = -rows % 16
    parts = []
    # The kernel's format is made of blocks of at most 64 rows, one behind the other.
    for stored in module.codes.detach().split(64 * max(1, BLOCK // (64 * columns))):
        codes = unpack(stored, columns).to(torch.int32) + 8
        codes = nn.functional.pad(codes, (0, 0, 0, -len(codes) % 16), value=8)
        parts.append(torch._convert_weight_to_int4pack_for_cpu(codes, 1))
    return torch._weight_int4pack_mm_for_cpu, torch.cat(parts), group, _pairs(module, group, rows + missing)


def pack_for_gpu(module: QuantizedLinear) -> tuple | None:
    """The kernel of a GPU for bfloat16, and its operands."""
    rows, columns = module.shape
    group = _kernel_group(module)
    tiles = next((tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0), None)
    capable = torch.version.hip is None and torch.cuda.get_device_capability(module.codes.device) >= (8, 0)
    if module.bits == 8 or group is None or tiles is None or not capable:
        return None
    codes = (unpack(module.codes.detach(), columns) + 8).view(torch.uint8)
    codes = nn.functional.pad(codes, (0, 0, 0, -rows % 8), value=8)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], tiles)
    return torch._weight_int4pack_mm, packed, group, _pairs(module, group, len(codes))


def _int8_product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """
    The kernel of 8 bits on tensors of their own.

    It loads whole registers where AVX-512 is, and ends the process if rows begin within one, as those of a file may,
    which is mapped. A compiler leaves out a copy, but no row that is added.
    """
    compiling = torch.compiler.is_compiling()
    own = nn.functional.pad(rows, (0, 0, 0, 1))[:-1] if compiling else rows.clone()
    return torch._weight_int8pack_mm(own, codes, scales)


PACKERS = {"cpu": pack_for_cpu, "cuda": pack_for_gpu}


def _kernel_group(module: Coded) -> int | None:
    """The size of groups that a kernel of 4 bits is given."""
    if module.group is not None:
        return module.group
    return next((size for size in KERNEL_GROUPS if module.shape[1] % size == 0), None)


def _pairs(module: Coded, group: int, rows: int) -> torch.Tensor:
    """Scales and zeros of groups, `[n / group, m, 2]` of bfloat16, for a kernel that takes `(q - 8) s + z`."""
    count = module.shape[1] // group
    scales = module.scales.detach().to(torch.bfloat16)
    scales = scales.expand(-1, count) if module.group is None else scales
    scales = nn.functional.pad(scales, (0, 0, 0, rows - len(scales)))
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether codes are brought for each call and taken away again: what is made of them must go, too."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


class _Product(torch.autograd.Function):
    """`c s x`, which keeps the codes for its derivative and not the weights behind them."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, module: QuantizedLinear) -> torch.Tensor:
        ctx.module, ctx.codes, ctx.scales = module, module.codes, module.scales
        return module.product(hidden_states)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        weight = spread(unpack(ctx.codes, ctx.module.shape[1]), ctx.scales, grad.dtype)
        return grad @ weight, None


def frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter that is stored, moved and offloaded as all are, and that nobody learns."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
