"""
The axes of a model's linear maps, as what lives beside the model meets them: what reads the input of a map, what
writes into it, what is written by its output, and what scales single coordinates.

For `B = g·A` the input `a` of a map `W` is `M (a + c)` in B, `W M⁻¹` being the map there; the table of frames says
what `W` becomes, hence what `M` is, and its translations say what `c` is. Everything is computed in float64.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch

from ...frames import table_of
from ...modeling_rigpt import RiGPTForCausalLM
from ..action import GaugeTransformation


# Relative differences up to this are rounding: of an operator that should be diagonal, of lengths that should stay.
ROUNDING = 1e-9
SEED = 0  # of the vectors that operators are tried on
Operator = Callable[[torch.Tensor], torch.Tensor]


class Axes:
    """
    A gauge transformation from A to B, as it acts on the axes of parameters.

    Args:
        g (`GaugeTransformation`): brings A to B.
    """

    def __init__(self, g: GaugeTransformation):
        self.g, self.table = g, table_of(g.config)
        self.linear = g.linear()

    @cached_property
    def back(self) -> GaugeTransformation:
        """From B to A, translations aside."""
        return self.linear.inverse()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of a model with its head, and their shapes."""
        with torch.device("meta"):
            model = RiGPTForCausalLM(self.g.config)
        return {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}

    def like(self, name: str, dim: int, tensor: torch.Tensor, at: int) -> torch.Tensor:
        """A tensor whose axis `at` turns as the axis `dim` of the parameter `name` does."""
        return self.linear.turn_axis(name, dim, tensor.to(torch.float64), at)

    def reading(self, name: str, tensor: torch.Tensor, at: int) -> torch.Tensor:
        """A tensor whose axis `at` reads the input of the map `name`, as the map's own second axis does."""
        return self.like(name, 1, tensor, at)

    def writing(self, name: str, tensor: torch.Tensor, at: int) -> torch.Tensor:
        """A tensor whose axis `at` is an input of the map `name`: turned so that its products with readers stay."""
        tensor = tensor.to(torch.float64)
        _, adjoint = torch.func.vjp(lambda x: self.back.turn_axis(name, 1, x, at), torch.zeros_like(tensor))
        return adjoint(tensor)[0]

    def input_shift(self, name: str) -> torch.Tensor | None:
        """The constant `c` `[in]` that translations add to the input of the map `name`; `None` if they add none."""
        total = None
        for key, shift in self.table.shifts.items():
            moves = [move for move in shift.moves.values() if move.reads == (name,)]
            element = self.g.elements.get(str(key))
            if element is None or not element.any() or not moves:
                continue
            # The change takes back what the map makes of `c`: it is -W c, and linear in W.
            probe = torch.zeros(1, self.shapes[name][1], dtype=torch.float64)
            change, vector = moves[0].change, element.flatten()
            taken_back, adjoint = torch.func.vjp(lambda w, change=change, c=vector: change(c, w).sum(), probe)
            added = -adjoint(torch.ones_like(taken_back))[0].flatten()
            total = added if total is None else total + added
        return total

    def is_translated(self, name: str) -> bool:
        """Whether translations change the parameter `name` itself."""
        return any(self.g.elements[str(key)].any() for key, _ in self.table.moved(name) if str(key) in self.g.elements)

    def frames_of(self, name: str, dim: int | None = None) -> str:
        """The frames in which a parameter (one axis of it) is turned, in words."""
        turns = [turned.key for turned in self.table.turns(name) if dim in (None, turned.dim)]
        return ", ".join(dict.fromkeys(str(key) for key in turns if str(key) in self.g.elements))

    def keeps_lengths(self, name: str) -> bool:
        """Whether the input of the map `name` has the same length in A and in B, translations aside."""
        turn, back = (lambda x, g=g: g.turn_axis(name, 1, x) for g in (self.linear, self.back))
        return is_orthogonal(turn, back, self.shapes[name][1:])


def is_orthogonal(turn: Operator, back: Operator, shape: Iterable[int]) -> bool:
    """Whether an operator on tensors of this shape keeps lengths: its inverse is its transpose."""
    probe = _gaussian(tuple(shape))
    _, adjoint = torch.func.vjp(back, torch.zeros_like(probe))
    return float((adjoint(probe)[0] - turn(probe)).norm()) <= ROUNDING * float(probe.norm())


def conjugated(turn: Operator, back: Operator, values: torch.Tensor) -> torch.Tensor | None:
    """
    The diagonal of `T diag(values) T⁻¹` for an operator T and its inverse; `None` where that is no diagonal, as it is
    for every `values` if T exchanges and scales coordinates, and for values that are constant where T turns.
    """
    values = values.to(torch.float64)
    diagonal = turn(values * back(torch.ones_like(values)))
    probe = _gaussian(tuple(values.shape))
    expected, found = diagonal * probe, turn(values * back(probe))
    size = max(float(expected.abs().max()), float(found.abs().max())) if probe.numel() else 0.0
    return diagonal if float((expected - found).abs().max()) <= ROUNDING * size else None


def _gaussian(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
