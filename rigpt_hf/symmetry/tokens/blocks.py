"""
A model with a symmetry that computes with the blocks of its maps, for inference.

In irreducible coordinates a map that commutes with the group is, for each irreducible, one matrix between its copies,
the same for each of its coordinates if it is of real kind, and zero elsewhere (Schur's lemma). A gauge transformation
brings all spaces there, and each map puts the numbers of a head together. Only neurons must stay: the group exchanges
them, so their maps change coordinates inside each orbit.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from ...frames import FrameKey, is_token_table, refuse_shared_frames
from ..action import GaugeTransformation
from .filling import Filling, size_of
from .isotypic import Axis, Decomposition, Part, matrices_of
from .representation import Representation


class Piece(NamedTuple):
    """
    Copies of one component of an axis: the first coordinate of all copies, then the second.

    Args:
        places: Where they are on the axis.
        copies: How many.
        basis: From irreducible coordinates, `[n, n]`; `None` where they are that.
        content: By irreducible its first coordinate, how often it is in the component, and its dimension.
    """

    places: slice
    copies: int
    basis: torch.Tensor | None
    content: dict[int, tuple[int, int, int]]

    def spans(self, irreducible: int, number: int) -> list[slice]:
        """Where the coordinates of an irreducible are on the axis, in a number of equal parts."""
        at, count, dim = self.content[irreducible]
        start, width = self.places.start + at * self.copies, count * dim * self.copies // number
        return [slice(start + width * i, start + width * (i + 1)) for i in range(number)]


class Layout:
    """An axis in an order in which all copies of a coordinate are neighbours; `order` says which place comes where."""

    def __init__(self, axis: Axis):
        self.axis, self.pieces, start = axis, [], 0
        self.order = torch.cat([part.places.T.flatten() for part in axis.parts])
        for part in axis.parts:
            columns, content, at = [], {}, 0
            for irreducible, count in part.content:
                content[irreducible] = at, count, axis.dims[irreducible]
                columns.append(at + torch.arange(count * axis.dims[irreducible]).reshape(count, -1).T.flatten())
                at += len(columns[-1])
            basis = None if part.basis is None else part.basis[:, torch.cat(columns)]
            places = slice(start, start + part.places.numel())
            self.pieces.append(Piece(places, len(part.places), basis, content))
            start = places.stop

    def holding(self, irreducible: int) -> Iterator[tuple[Piece, slice]]:
        """The pieces with an irreducible, and which of its copies are in them."""
        start = 0
        for piece in self.pieces:
            if irreducible in piece.content:
                stop = start + piece.content[irreducible][1] * piece.copies
                yield piece, slice(start, stop)
                start = stop


# A block `[from, to]`, and pairs of the coordinates that it reads and of those that it adds to.
Block = tuple[torch.Tensor, list[tuple[slice, slice]]]
Order: TypeAlias = torch.Tensor | None


def blocks_of(decomposition: Decomposition, weight: torch.Tensor, rows: Layout, columns: Layout) -> list[Block]:
    """The blocks of a map `[m, n]` that commutes with the group."""
    weight = rows.axis.change(weight).to(weight)
    weight = columns.axis.change(weight).to(weight.mT).mT
    made = []
    for index in rows.axis.blocks.keys() & columns.axis.blocks.keys():
        dim = decomposition.dims[index]
        block = weight[rows.axis.blocks[index], columns.axis.blocks[index]]
        block = block.unflatten(1, (-1, dim)).unflatten(0, (-1, dim))
        if decomposition.kinds[index] == 1:
            block = block.diagonal(dim1=1, dim2=3).mean(-1)[:, None, :, None]
        number = dim // block.shape[1]  # of times that one block is used
        for target, written in rows.holding(index):
            for source, read in columns.holding(index):
                part = block[written, :, read].unflatten(2, (source.copies, -1)).unflatten(0, (target.copies, -1))
                part = part.permute(5, 4, 3, 2, 1, 0).flatten(3).flatten(0, 2).contiguous()
                reads, writes = (piece.spans(index, number) for piece in (source, target))
                made.append((part, list(zip(reads, writes, strict=True))))
    return made


class Mixing(nn.Module):
    """Vectors `[N, n]` with each piece in another basis, if it has one; the numbers of a coordinate together."""

    def __init__(self, pieces: Sequence[Piece], back: bool):
        super().__init__()
        self.places = [piece.places for piece in pieces]
        self.bases = _frozen([one.basis if back or one.basis is None else one.basis.T.contiguous() for one in pieces])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x.new_empty(x.shape[1], len(x))
        for places, basis in zip(self.places, self.bases, strict=True):
            read, written = x.t()[places], result[places]
            if basis is None:
                written.copy_(read)
            else:
                torch.mm(basis, read.reshape(len(basis), -1), out=written.view(len(basis), -1))
        return result.t()


class BlockLinear(nn.Module):
    """
    A linear map by its blocks, and a bias `[m]`; it has no derivative.

    Args:
        made: The blocks.
        sides: The layouts of what it writes, `[..., m]`, and of what it reads, `[..., n]`.
        orders: Those of the layouts, where the numbers of a vector are not in them.
    """

    def __init__(
        self, made: Sequence[Block], sides: Sequence[Layout], orders: Sequence[Order], bias: nn.Parameter | None
    ):
        super().__init__()
        self.blocks = _frozen([block for block, _ in made])
        # The number of the block, what it reads, what it adds to, and whether something is there already.
        self.steps: list[tuple[int, slice, slice, bool]] = []
        for number, (_, pairs) in enumerate(made):
            begun = {target.start for _, _, target, _ in self.steps}
            self.steps += [(number, source, target, target.start in begun) for source, target in pairs]
        (rows, columns), (order_out, order_in) = sides, orders
        self.complete = columns.axis.blocks.keys() >= rows.axis.blocks.keys()
        mixed = [any(piece.basis is not None for piece in side.pieces) for side in sides]
        self.mix_out = Mixing(rows.pieces, back=True) if mixed[0] else None
        self.mix_in = Mixing(columns.pieces, back=False) if mixed[1] else None
        self.register_buffer("order_out", None if order_out is None else order_out.argsort())
        self.register_buffer("order_in", order_in)
        self.bias = bias
        self.in_features, self.out_features = len(columns.order), len(rows.order)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., m]` from `[..., n]`."""
        x = hidden_states.reshape(-1, self.in_features)
        if self.order_in is not None:
            x = x.index_select(1, self.order_in)
        if self.mix_in is not None:
            x = self.mix_in(x)
        new = x.new_empty if self.complete else x.new_zeros
        # Coordinates that are mixed afterwards have the numbers of all vectors together.
        y = new(len(x), self.out_features) if self.mix_out is None else new(self.out_features, len(x)).t()
        blocks = list(self.blocks)
        for number, source, target, more in self.steps:
            if more:
                y[:, target].addmm_(x[:, source], blocks[number])
            else:
                torch.mm(x[:, source], blocks[number], out=y[:, target])
        if self.mix_out is not None:
            y = self.mix_out(y)
        if self.order_out is not None:
            y = y.index_select(1, self.order_out)
        if self.bias is not None:
            y += self.bias
        return y.view(*hidden_states.shape[:-1], self.out_features)


def _frozen(tensors: Sequence[torch.Tensor | None]) -> nn.ParameterList:
    return nn.ParameterList(one if one is None else nn.Parameter(one, requires_grad=False) for one in tensors)


def irreducible_coordinates(representation: Representation) -> tuple[GaugeTransformation, Representation]:
    """
    The change of frames after which all matrices are irreducible blocks, and the representation there.

    Raises:
        ValueError: if the representation was not made of parts, or its group is too large to list.
    """
    if representation.filling is None or not representation.decomposition.listed:
        raise ValueError(
            "`representation` must be made of parts, of a group that can be listed, got another. Take "
            "`Representation.choose`."
        )
    references, frames = representation.decomposition.references[1:], dict(representation.filling.frames)
    elements: dict[FrameKey, torch.Tensor] = {}
    for key, frame, _ in representation.transformations[0].items():
        if frame.represents == "matrices":
            stacks = [one.elements[str(key)] for one in representation.transformations]
            same = torch.eye(size_of(frame), dtype=torch.float64)
            axes = [
                representation.decomposition.axis([stack[copy].matmul for stack in stacks], len(same))
                for copy in range(frame.copies)
            ]
            elements[key] = torch.stack([axis.change(same).to(same) for axis in axes])
            counts = [[axis.multiplicities.get(i, 0) for i in range(1, len(references) + 1)] for axis in axes]
            frames[key.kind] = "matrices", counts
    filling = Filling(tuple(one.matrices for one in references), representation.filling.permutations, frames)
    turn = GaugeTransformation(representation.config, elements)
    turn = turn if representation.frame is None else turn @ representation.frame.inverse()
    return turn, Representation.filled(representation.config, representation.symmetry, filling)


@torch.no_grad()
def in_blocks(model: Any, representation: Representation | None = None) -> Any:
    """
    A copy of a symmetric RiGPT, head included, that computes the same with the blocks of its maps; without gradients.

    Args:
        model: The model.
        representation: How it carries its symmetry; what its configuration records if not given.

    Raises:
        ValueError: if there is none, it was not made of parts or its group cannot be listed, weights do not have the
            symmetry within `Representation.tolerance`, are quantized, or are interpolated between layers.
    """
    representation = Representation.from_config(model.config) if representation is None else representation
    _check(model, representation)
    state = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    turn, there = irreducible_coordinates(representation)
    state = turn.state_dict(representation.project_state(state))
    table, decomposition = there.table, there.decomposition
    layouts: dict[int, Layout] = {}

    def layout(name: str, dim: int) -> Layout:
        length = state[name].shape[dim]
        axis = there.axes(name, state[name].shape)[dim]
        if axis is None:
            return Layout(Axis([Part(torch.arange(length)[:, None], None, ((0, 1),))], decomposition.dims))
        return layouts.setdefault(id(axis), Layout(axis))

    def order(name: str, dim: int) -> Order:
        keys = {turned.key for turned in table.turns(name) if turned.dim == dim}
        rests = there.axes(name, state[name].shape)[dim] is None
        return None if rests or keys <= orders.keys() else layout(name, dim).order

    # Frames other than those of heads can be brought to the order of their layouts.
    orders: dict[FrameKey, torch.Tensor] = {}
    for key, frame, _ in there.transformations[0].items():
        carrier = next((one for one in table.carriers(key) if one[0] in state), None)
        if frame.carrier is None and carrier is not None:
            action = layout(*carrier).order.argsort()[None]
            permuted = frame.represents == "permutations"
            orders[key] = frame.group.representing(action if permuted else matrices_of(action.numpy()))
    result = copy.deepcopy(model).eval().requires_grad_(False)
    for name, tensor in GaugeTransformation(there.config, orders).state_dict(state).items():
        result.get_parameter(name).copy_(tensor)
    for name, weight in state.items():
        path = name.rpartition(".")[0]
        module = result.get_submodule(path)
        moved = any(axis is not None for axis in there.axes(name, weight.shape))
        if type(module) is nn.Linear and weight.dim() == 2 and moved and not is_token_table(name):
            sides, rest = [layout(name, dim) for dim in (0, 1)], [order(name, dim) for dim in (0, 1)]
            linear = BlockLinear(blocks_of(decomposition, weight, *sides), sides, rest, module.bias)
            result.set_submodule(path, linear.to(module.weight))
    result.config.token_symmetry = None  # it is of the frame before
    result.save_pretrained = _refuse_saving
    return result


def _check(model: Any, representation: Representation) -> None:
    refuse_shared_frames(model.config, "Running in blocks")
    parameters = list(model.parameters())
    plain = all(type(one) is nn.Parameter and one.is_floating_point() for one in parameters)
    if not plain or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("`model` must have plain weights, got quantized ones. Give the model that was quantized.")
    distance, most = representation.distance(model), Representation.tolerance(parameters[0].dtype)
    if distance > most:
        raise ValueError(
            f"`model` must have the symmetry, got weights that are {distance:.2g} of their norm from it, more than "
            f"{most:.2g}. `symmetrize` gives the nearest that have it."
        )


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise ValueError("A model in blocks is not saved. Save the model that it was made of, and call `in_blocks` again.")
