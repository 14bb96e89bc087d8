"""
Numbers of a few bits with a scale: `codes · scale`, codes whole numbers from `-2**(bits-1)` to `2**(bits-1) - 1`.

A scale belongs to a row of a matrix or to a group of neighbours in a row. It may be negative, which puts the longer
end of the grid where the largest number is.
"""

from dataclasses import dataclass

import torch


# Scales that are tried, relative to that with which nothing is cut off.
SHORTEST, TRIED = 0.4, 25
# Rows of at most so many numbers are tried both ways round.
SHORT = 128
# Numbers that are rounded in one go while scales are tried.
AT_ONCE = 2**21
BITS = range(2, 9)


@dataclass(frozen=True)
class Codes:
    """
    A matrix `[m, n]` on the grid, its rows outputs: `codes · scales · gain`.

    Args:
        codes (`torch.Tensor` of shape `[m, n]`): int8, whole numbers of `bits` bits.
        scales (`torch.Tensor` of shape `[m, n / group]`): float32, each a number of half precision; one column without
            groups.
        bits (`int`): Of each code.
        group (`int`, *optional*): Neighbours in a row that share a scale; `None` for all of them.
        gain (`torch.Tensor` of shape `[n]`, *optional*): Factors of the inputs, numbers of half precision too.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int | None
    gain: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix itself, multiplied in float32 at least and cast once."""
        algebra = torch.promote_types(dtype, torch.float32)
        rows, width = self.codes.shape
        parts = self.codes.to(algebra).reshape(rows, self.scales.shape[1], -1) * self.scales.to(algebra)[..., None]
        matrix = parts.reshape(rows, width)
        return (matrix if self.gain is None else matrix * self.gain.to(algebra)).to(dtype)

    def split(self, rows: list[int]) -> list["Codes"]:
        """So many rows each, one after the other."""
        parts = zip(self.codes.split(rows), self.scales.split(rows), strict=True)
        return [Codes(codes, scales, self.bits, self.group, self.gain) for codes, scales in parts]

    @property
    def stored_bits(self) -> int:
        """Bits that it takes: codes, and 16 for every scale and gain."""
        numbers = self.scales.numel() + (0 if self.gain is None else self.gain.numel())
        return self.codes.numel() * self.bits + 16 * numbers


def check_grid(bits: int, group: int | None = None, **widths: int) -> None:
    """
    Raise a `ValueError` if a grid is impossible, or a group does not divide one of the widths.

    Args:
        bits, group: As of [`Codes`].
        widths: Numbers in a row, by what to call the matrix.
    """
    if bits not in BITS:
        raise ValueError(f"`bits` must be from {BITS[0]} to {BITS[-1]}, got {bits}. Take 4 or 8.")
    if group is None:
        return
    if group < 1:
        raise ValueError(f"`group` must be at least 1, or None for whole rows, got {group}.")
    for name, width in widths.items():
        if width % group:
            raise ValueError(
                f"`group` must divide the {width} numbers in a row of {name}, got {group}. Take a divisor, or no "
                "group, for whole rows."
            )


def half(values: torch.Tensor) -> torch.Tensor:
    """
    The nearest numbers of half precision, in the dtype that they had.

    Raises:
        ValueError: if one is too large for it.
    """
    nearest = values.half().to(values.dtype)
    if not bool(nearest.isfinite().all()):
        raise ValueError(
            f"`model` must have weights whose scales half precision can hold, got {float(values.abs().max())} as one. "
            "See whether single rows of weights are damaged."
        )
    return nearest


def to_codes(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes, in the dtype of `values`, which `scales` broadcast to; 0 where a scale is."""
    inverse = torch.where(scales == 0, 0.0, 1 / torch.where(scales == 0, 1.0, scales))
    return (values * inverse).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def widest_scales(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales `[rows]` with which the largest of each row of `[rows, n]` is exactly represented, and its opposite."""
    return half(values.abs().amax(dim=-1) / (2 ** (bits - 1) - 1))


def best_scales(values: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """
    The scales `[rows]` of half precision with the least `Σ importance (values - rounded)²` among those tried.

    Args:
        values (`torch.Tensor` of shape `[rows, n]`).
        importance (`torch.Tensor` of shape `[n]`): of each coordinate, not negative.
    """
    largest = values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))[..., 0]
    reach = largest.abs() / (2 ** (bits - 1) - 1)
    shares = torch.linspace(SHORTEST, 1.0, TRIED, dtype=values.dtype, device=values.device)
    # The largest lies on the longer end of the grid; or on the other, which seldom is better, and never in long rows.
    ends = (-1, 1) if values.shape[-1] <= SHORT else (-1,)
    tried = torch.cat([half(shares[:, None] * reach) * largest.sign() * end for end in ends])
    best, least = half(reach), torch.full_like(reach, torch.inf)
    for scales in tried.split(max(1, AT_ONCE // values.numel())):
        rounded = to_codes(values, scales[..., None], bits).mul_(scales[..., None])
        errors, places = (rounded.sub_(values).square_() @ importance).min(dim=0)
        chosen = scales.gather(0, places[None])[0]
        best, least = torch.where(errors < least, chosen, best), torch.minimum(errors, least)
    return best


def rounded_codes(
    weight: torch.Tensor,
    bits: int,
    group: int | None = None,
    importance: torch.Tensor | None = None,
    *,
    clip: bool = True,
    gain: torch.Tensor | None = None,
) -> Codes:
    """
    A matrix `[m, n]` rounded to nearest.

    Args:
        weight: Rows are outputs.
        bits, group, gain: As of [`Codes`]; `gain` is taken out first.
        importance (`torch.Tensor` of shape `[n]`, *optional*): The mean squares of the inputs; all alike if not given.
        clip: Search for the scale with the least error, which may cut off the largest; else nothing is cut off.

    Raises:
        ValueError: if the grid is impossible.
    """
    rows, width = weight.shape
    check_grid(bits, group, **{"the matrix": width})
    size = group or width
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weights = torch.ones(width) if importance is None else importance
    weights = weights.to(weight)
    if gain is not None:
        gain = half(gain.to(weight))
        weight, weights = weight / gain, weights * gain.square()
    scales = weight.new_empty(rows, width // size)
    for index in range(width // size):
        part = slice(index * size, (index + 1) * size)
        values = weight[:, part]
        scales[:, index] = best_scales(values, weights[part], bits) if clip else widest_scales(values, bits)
    codes = to_codes(weight.reshape(rows, -1, size), scales[..., None], bits)
    stored = None if gain is None else gain.float()
    return Codes(codes.reshape(rows, width).to(torch.int8), scales.float(), bits, group, stored)
