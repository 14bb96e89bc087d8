"""
The search for a gauge transformation between two models that need not be in memory: a block of weights at a time.

Frames of a layer meet those of another only through the residual stream. So while the stream rests every layer is
settled by itself, and the stream's own rotation needs no more of a layer than its cross-covariance `[d, d]`: memory is
that of two layers, or of two token tables, and a sweep costs what its layers cost. It is the search of
`alignment.py`, which has both models in memory and leaves them aligned.

Weights are on a device of the caller's choice, and so are products of them. Elements of groups, Gram matrices and all
that is decomposed or assigned stay on the CPU: contractions bring there what they give, actions bring their matrices
to the weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import frexp, isfinite
from typing import Any

import torch

from ..checkpoints.opened import OpenedModel
from ..configuration_rigpt import RiGPTConfig
from ..frames import FrameKey, is_choice_of_frames, layer_of, table_of
from ..table import STREAMS
from .action import GaugeTransformation
from .alignment import EXACT, FOUND, UNPAIRED, Search, one_thread
from .balance import PASSES, balance
from .contraction import UNBALANCED, View, Weights, decomposable
from .local_frames import along, flattening, without_transports
from .progress import bar_to


# The block of what lies outside the layers.
ENDS = None
Block = int | None
Tick = Callable[[list[float]], None]
# Powers of two by which weights may differ from 1 before float32 is too narrow for products of them.
NARROW = 24
# Models as near as this after one sweep have found all of their heads and neurons.
NEAR = 1e-2
# Narrower streams lose more by sharing their products among threads than they gain.
WIDE = 2048
# Algebra in the working precision loses so many units in the last place on its way through a few matrix products.
ALGEBRA = 100.0


def part_of(name: str) -> str:
    """The part of the network a parameter belongs to: `layers.3.self_attn`, or `embed_tokens` outside the layers."""
    pieces = name.removeprefix("model.").split(".")
    return ".".join(pieces[:3] if pieces[0] == "layers" else pieces[:1])


class Distances:
    """Squares of differences and of norms by part of the network, added up block by block."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}

    def add(self, a: Weights, b: Weights) -> None:
        """Add a block of two sets of weights; the maps between frames, which are a choice, do not count."""
        for name, tensor in a.items():
            if is_choice_of_frames(name):
                continue
            other = b[name]
            values = [_square(side) for side in (tensor - other, tensor, other)]
            part = part_of(name)
            for key in ("all", part, *(["layers"] if part.startswith("layers.") else [])):
                self._squares[key] = [x + y for x, y in zip(self._squares.get(key, [0.0] * 3), values, strict=True)]

    def less(self, square: float) -> float:
        """The relative distance over all weights if its square were less by so much."""
        difference, first, second = self._squares["all"]
        return (max(difference - square, 0.0) / max((first + second) / 2, 1e-300)) ** 0.5

    def relative(self) -> dict[str, float]:
        """Relative distances by part, over all `layers`, and over `all`."""
        return {
            key: (difference / max((first + second) / 2, 1e-300)) ** 0.5
            for key, (difference, first, second) in self._squares.items()
        }


def _square(tensor: torch.Tensor) -> float:
    # A cast by itself takes half as long as one inside the norm.
    return float(torch.linalg.vector_norm(tensor.double())) ** 2


def blocks_of(names: Sequence[str]) -> dict[Block, list[str]]:
    """The parameters outside the layers, then those of every layer."""
    blocks: dict[Block, list[str]] = {ENDS: []}
    for name in names:
        blocks.setdefault(layer_of(name), []).append(name)
    return blocks


class Balanced:
    """
    The balanced weights of a model, a block at a time.

    Args:
        model: The model.
        unpaired, passes: As for [`balance`].
        device: Where its blocks are put.
        dtype: What a block is balanced in, once it is known how.
    """

    dtype = torch.float64

    def __init__(self, model: OpenedModel, unpaired: float, passes: int, device: torch.device):
        self.model, self.unpaired, self.passes, self.table = model, unpaired, passes, table_of(model.config)
        self.device = device
        self.blocks = blocks_of(list(model.weights.shapes))
        transports = {name: model.weights.read(name) for name in self.table.transports if name in model.weights.shapes}
        self.flat = flattening(model.config, transports)
        self.steps: dict[Block, GaugeTransformation] = {}

    def raw(self, block: Block) -> dict[str, torch.Tensor]:
        """A block as it is."""
        return {name: self.model.weights.read(name).to(self.device) for name in self.blocks[block]}

    def weights(self, block: Block) -> dict[str, torch.Tensor]:
        """A balanced block."""
        raw = self.raw(block)
        if block not in self.steps:
            with one_thread(block is not ENDS):
                self.steps[block], made = balance(self.model.config, raw, self.passes, self.unpaired, self.flat)
            return made
        return self.steps[block].state_dict({name: tensor.to(self.dtype) for name, tensor in raw.items()}, self.dtype)

    @property
    def transformation(self) -> GaugeTransformation:
        """The transformation that balances all blocks."""
        return merged(self.model.config, self.steps.values())


def merged(config: RiGPTConfig, parts: Iterable[GaugeTransformation]) -> GaugeTransformation:
    """Transformations of different frames, or the same of the same frames, as one."""
    return GaugeTransformation(config, {key: element for part in parts for key, element in part.elements.items()})


class LayeredSearch:
    """
    Brings the balanced weights of one model to a target.

    Args:
        config (`RiGPTConfig`): of both.
        blocks (`Iterable`): all blocks.
        ours, target (`Callable`): give a block of balanced weights of each.
        dtype (`torch.dtype`): what everything but decompositions is computed in.
        power (`int`): of two, which all weights are multiplied by on their way into it.
    """

    def __init__(
        self,
        config: RiGPTConfig,
        blocks: Iterable[Block],
        ours: Callable[[Block], Weights],
        target: Callable[[Block], Weights],
        dtype: torch.dtype,
        power: int = 0,
    ):
        self.config, self.table, self.blocks = config, table_of(config), list(blocks)
        self.ours, self.target, self.dtype, self.power = ours, target, dtype, power
        self.steps = dict.fromkeys(self.blocks, GaugeTransformation.identity(config))
        self.rotation = torch.eye(config.hidden_size, dtype=torch.float64)[None]

    def step(self, block: Block) -> GaugeTransformation:
        """The transformation that the search has found for a block."""
        turn = GaugeTransformation(self.config, along(self.table, self.rotation))
        return merged(self.config, [self.steps[block], turn])

    def aligned(self, block: Block) -> dict[str, torch.Tensor]:
        """A block of the model as far as it has come."""
        return self.step(block).state_dict(self._cast(self.ours(block)), self.dtype)

    def _cast(self, weights: Weights) -> dict[str, torch.Tensor]:
        power = torch.tensor(self.power)
        scaled = {name: tensor.ldexp(power) if self.power else tensor for name, tensor in weights.items()}
        return {name: tensor.to(self.dtype) for name, tensor in scaled.items()}

    def run(self, max_sweeps: int, tolerance: float, tick: Tick) -> tuple[list[float], Distances]:
        """
        Sweep until that changes nothing to speak of; the distances after every sweep, and those after the last by
        part. The arguments are those of [`Search.run`]; `tick` is called after every block with the last distance.
        """
        self._turn_by_tokens()
        distances: list[float] = []
        while True:
            measured, turned = self._sweep(lambda: tick(distances))
            distances.append(turned)
            before = measured.relative()["all"]
            gained = distances[-2] - turned if len(distances) > 1 else before
            # Near models whose stream rests have found all of their heads and neurons.
            rests = turned < NEAR and before - turned <= tolerance * turned
            is_there = rests or gained <= tolerance * turned or turned <= ALGEBRA * torch.finfo(self.dtype).eps
            if is_there or len(distances) >= max_sweeps:
                return distances, measured

    def _turn_by_tokens(self) -> None:
        search = Search(self.config, self._cast(self.ours(ENDS)), self._cast(self.target(ENDS)))
        beginning = search.turn_of("entry")
        if beginning:
            search.go(beginning)
        self.rotation = search.turn_of("stream")[FrameKey("stream")]
        self.steps[ENDS] = GaugeTransformation(self.config, beginning)

    def _sweep(self, tick: Callable[[], object]) -> tuple[Distances, float]:
        """Settle all blocks, then the stream; the distances in between, and the one of all weights afterwards."""
        distances, crosses = Distances(), []
        for block in self.blocks:
            with one_thread(block is not ENDS):
                search = Search(self.config, self.aligned(block), self._cast(self.target(block)))
                search.sweep(but=STREAMS)
                self.steps[block] = search.total @ self.steps[block]
                distances.add(search.weights, search.target)
                sides = (without_transports(side) for side in (search.target, search.weights))
                crosses.append(View(self.table, self.table.streams, *sides).total().double())
            tick()
        cross = torch.stack(crosses).sum(dim=0)
        step = self.table.kinds["stream"].group.procrustes(cross)
        self.rotation = step @ self.rotation
        return distances, distances.less(2 * float((step * cross).sum() - cross.diagonal(dim1=1, dim2=2).sum()))


@dataclass
class Found:
    """
    The outcome of a search for what brings A to B.

    Args:
        transformation (`GaugeTransformation`): brings A to B, as they are given.
        distances (`list[float]`): over all weights, balanced, after every sweep.
        parts (`dict[str, float]`): by part of the network, after the last.
        search (`LayeredSearch`), theirs (`Balanced`): how it was found, and the balanced weights of B.
    """

    transformation: GaugeTransformation
    distances: list[float]
    parts: dict[str, float]
    search: LayeredSearch = field(repr=False)
    theirs: Balanced = field(repr=False)

    def aligned(self, block: Block) -> dict[str, torch.Tensor]:
        """A block of A's balanced weights, aligned with those of B, in float64."""
        power = torch.tensor(-self.search.power)
        return {name: tensor.double().ldexp(power) for name, tensor in self.search.aligned(block).items()}


@torch.no_grad()
@decomposable()
def search_layers(
    a: OpenedModel,
    b: OpenedModel,
    dtype: torch.dtype,
    *,
    max_sweeps: int,
    tolerance: float = FOUND,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Found:
    """
    Look for the transformation that brings A nearest to B, layer by layer.

    Args:
        a, b: Two models of one configuration, see [`check_alike`].
        dtype: What everything but decompositions is computed in, float32 or float64.
        max_sweeps, tolerance, progress: As for [`find_alignment`].
        device: Where weights are, two blocks at a time, and products of them; it must have float64. If absent, a GPU
            of CUDA where there is one, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    blocks = len(blocks_of(list(a.weights.shapes)))
    with bar_to(blocks * max_sweeps, "Aligning", "layer", progress) as bar:

        def tick(distances: list[float]) -> None:
            bar.update()
            if distances:
                bar.set_postfix_str(f"distance {distances[-1]:.3g}")

        limits = max_sweeps, tolerance, tick
        with one_thread(b.config.hidden_size < WIDE):
            found = _search(a, b, dtype, device, UNPAIRED, *limits)
        if dtype == torch.float64 and found.distances[-1] < EXACT:
            # The short length costs digits, and without rounding between the models nothing speaks for it.
            exact = _search(a, b, dtype, device, 1.0, *limits)
            if exact.distances[-1] < EXACT:
                return exact
    return found


def _search(
    a: OpenedModel, b: OpenedModel, dtype: torch.dtype, device: torch.device, unpaired: float, *limits: Any
) -> Found:
    # One pass has more digits than float32.
    passes = PASSES if dtype == torch.float64 else 1
    ours, theirs = (Balanced(model, unpaired, passes, device) for model in (a, b))
    power = 0 if dtype == torch.float64 else _power(ours, theirs)
    if power:
        dtype = torch.float64
    else:
        ours.dtype = theirs.dtype = dtype
    search = LayeredSearch(b.config, ours.blocks, ours.weights, theirs.weights, dtype, power)
    distances, measured = search.run(*limits)
    between = merged(b.config, [search.step(block) for block in search.blocks])
    total = theirs.transformation.inverse() @ between @ ours.transformation
    return Found(total, distances, measured.relative(), search, theirs)


def _power(*sides: Balanced) -> int:
    """The power of two by which the mean square of a layer's weights is near 1; 0 if they are in range."""
    sizes, count = [], 0
    for side in sides:
        for block in list(side.blocks)[1:2]:
            for tensor in side.weights(block).values():
                sizes.append(float(torch.linalg.vector_norm(tensor)))
                count += tensor.numel()
    largest = max(sizes, default=0.0)
    mean = largest * (sum((size / (largest or 1)) ** 2 for size in sizes) / max(count, 1)) ** 0.5
    if not isfinite(mean):
        raise ValueError(UNBALANCED)
    power = -frexp(mean)[1]
    return power if abs(power) > NARROW else 0
