"""The algebra of exact conversion, in float64, one cast at the end, in blocks so that no large float64 copy exists.

Shapes: d stream, D lexical, n outputs of a map. With `C = I - 11ᵀ/d` (identity where the norm does not centre), gain
`g` and bias `β` of the norm in front, and a constant `s` of the stock model (queries, residual branches, embeddings,
logits; 1 where it has none):

    readers     W ← s W diag(g) C   b ← s (b + W β)     [n, d]
    writers     W ← s C W           b ← s C b           [d, n]
    heads       W ← s C W diag(g) C b ← s C (b + W β)   [h, d] of each, in front of a norm of heads with a mean
    rows        P ← s P C                               [positions or tokens, d]
    injection   U = s C                                 [d, D], D = d
    extraction  G = s diag(g) C     b = s β             [D, d], D = d

Where the stock head has a bias `c`, `D = d + 1`: the head reads the table `[E, c]`, zeros follow `U` and `G`, and 1
follows `b`.

A centred stream makes LayerNorm without gain and bias equal to `n(x) = x / sqrt(mean(x²) + eps)`; that gains and
biases fold this way is known from SliceGPT (arXiv 2401.15024) and TransformerLens.
"""

from collections.abc import Callable

import torch


# Numbers in float64 held at a time: 32 MiB.
BLOCK = 2**22


def in_blocks(
    tensor: torch.Tensor,
    dim: int,
    dtype: torch.dtype,
    fold: Callable[..., torch.Tensor],
    *along: torch.Tensor,
    unit: int = 1,
) -> torch.Tensor:
    """
    `fold` in float64 on slices along `dim`, of which it must treat each `unit` independently, and on those of what
    else lies `along` it; the result is cast to `dtype`.
    """
    result = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    count = tensor.shape[dim]
    step = max(1, BLOCK * count // max(tensor.numel(), 1) // unit) * unit
    for start in range(0, count, step):
        length = min(step, count - start)
        block = tensor.narrow(dim, start, length).to(torch.float64)
        result.narrow(dim, start, length).copy_(fold(block, *(vector.narrow(0, start, length) for vector in along)))
    return result


def centre_heads(rows: torch.Tensor, size: int | None) -> torch.Tensor:
    """`C W` for the `size` rows of each head in `[n, ...]`; `None`: as they are."""
    if size is None:
        return rows
    heads = rows.unflatten(0, (-1, size))
    return (heads - heads.mean(dim=1, keepdim=True)).flatten(0, 1)


def fold_reader(
    weight: torch.Tensor,
    gain: torch.Tensor | None,
    centred: bool,
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    head: int | None = None,
) -> torch.Tensor:
    """
    `scale · W diag(g) C` for a reader `[n, d]`, `scale` a number or one for each row `[n]`; but for those of a `head`
    of that size, with a mean, rows do not mix, so no product of matrices is needed.
    """
    gain = None if gain is None else gain.to(torch.float64)

    def fold(rows: torch.Tensor, scale: float | torch.Tensor = scale) -> torch.Tensor:
        rows = rows if gain is None else rows * gain
        rows = centre_heads(rows - rows.mean(dim=1, keepdim=True) if centred else rows, head)
        return rows * scale if isinstance(scale, torch.Tensor) or scale != 1.0 else rows

    along = [scale[:, None]] if isinstance(scale, torch.Tensor) else []
    return in_blocks(weight, 0, dtype, fold, *along, unit=head or 1)


def fold_reader_bias(
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    head: int | None = None,
) -> torch.Tensor:
    """`scale · (b + W β)`, `[n]`, with the unfolded weight `[n, d]`; either summand may be absent; `head` as above."""
    total: torch.Tensor | float = 0.0 if bias is None else bias.to(torch.float64)
    if weight is not None and norm_bias is not None:
        beta = norm_bias.to(torch.float64)
        step = max(1, BLOCK // weight.shape[1])
        total = torch.cat([rows.to(torch.float64) @ beta for rows in weight.split(step)]) + total
    assert isinstance(total, torch.Tensor)
    return (centre_heads(total, head) * scale).to(dtype)


def fold_writer(weight: torch.Tensor, centred: bool, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`scale · C W` for a writer `[d, n]`, or `scale · C b` for its bias `[d]`."""
    if not centred and scale == 1.0:
        return weight.to(dtype)

    def fold(columns: torch.Tensor) -> torch.Tensor:
        return scale * (columns - columns.mean(dim=0, keepdim=True) if centred else columns)

    return fold(weight.to(torch.float64)).to(dtype) if weight.dim() == 1 else in_blocks(weight, 1, dtype, fold)


def fold_rows(table: torch.Tensor, centred: bool, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """`scale · P C` for a table `[positions, d]` whose rows are vectors of the stream."""
    return fold_reader(table, None, centred, scale, dtype) if centred or scale != 1.0 else table.to(dtype)


def extended(tensor: torch.Tensor, dim: int, last: torch.Tensor) -> torch.Tensor:
    """A tensor with one more entry along `dim`: one number for all, or one for each entry of the other axis."""
    shape = list(tensor.shape)
    shape[dim] = 1
    last = last.to(tensor.device, tensor.dtype)
    return torch.cat((tensor, last.expand(shape) if last.dim() == 0 else last.reshape(shape)), dim)


def projection(
    size: int, gain: torch.Tensor | None, centred: bool, scale: float, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """`scale · diag(g) C`, `[size, size]`: project_in (no gain) and project_out."""
    gain = scale * (torch.ones(size, dtype=torch.float64, device=device) if gain is None else gain.to(torch.float64))
    result = torch.zeros(size, size, dtype=dtype, device=device)
    step = max(1, BLOCK // size)
    for start in range(0, size, step):
        rows = gain[start : start + step]
        block = -rows[:, None].expand(-1, size) / size if centred else rows.new_zeros(len(rows), size)
        block = block.clone()
        block[torch.arange(len(rows)), torch.arange(start, start + len(rows))] += rows
        result[start : start + step] = block
    return result
