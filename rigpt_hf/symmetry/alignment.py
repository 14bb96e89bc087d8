"""
Aligning one model with another: the gauge transformation after which their weights are nearest.

Both are balanced first, which leaves rotations, reflections and permutations (`balance.py`). Over these the distance
is made smaller by turns: orthogonal Procrustes for the stream and the spaces of tokens and heads, assignment for heads
and neurons, each solved while the others rest, until nothing improves. Where this starts decides in which minimum it
ends: it starts from the tokens, whose order is the same in both models.

Related: Git Re-Basin (arXiv 2209.04836) matches permutations; here the rotations that a RiGPT allows come first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from ..configuration_rigpt import RiGPTConfig
from .action import GaugeTransformation
from .balance import balance
from .canonical import token_vectors
from .contraction import Weights, contract, weights_of
from .frames import axes, frame_keys, kind_of, layer_of, prefix_of, row
from .groups import MatrixGroup
from .local_frames import along, without_transports
from .permutations import HeadPermutations, NeuronGroup
from .procrustes import assignment, largest_trace, nearest


@dataclass
class Alignment:
    """
    The outcome of an alignment, in the balanced frame of the reference.

    Args:
        transformation (`GaugeTransformation`): brings the model to the reference, as they are given.
        to_balanced (`GaugeTransformation`): brings the reference to its balanced form.
        aligned, reference (`dict[str, torch.Tensor]`): the balanced weights of both, aligned.
        distances (`list[float]`): after every sweep.
        converged (`bool`): whether the last sweep changed nothing to speak of.
    """

    transformation: GaugeTransformation
    to_balanced: GaugeTransformation
    aligned: Weights
    reference: Weights
    distances: list[float] = field(default_factory=list)
    converged: bool = False

    @property
    def distance(self) -> float:
        """See [`gauge_distance`]."""
        return self.distances[-1]


def align(
    model: nn.Module, reference: nn.Module, *, max_sweeps: int = 100, tolerance: float = 1e-5, progress: bool = False
) -> GaugeTransformation:
    """
    The transformation that brings `model` nearest to `reference`: `align(a, b)(a)` is `a` in the frames of `b`.

    Args:
        model, reference: Two RiGPTs of one configuration; neither is changed.
        max_sweeps: Rounds through all frames at most.
        tolerance: Stop when a round lowers the distance by less than this part of it.
        progress: Show a progress bar.

    Raises:
        ValueError: if the two have different shapes or options.
    """
    found = find_alignment(model, reference, max_sweeps=max_sweeps, tolerance=tolerance, progress=progress)
    return found.transformation


def gauge_distance(a: nn.Module, b: nn.Module, *, max_sweeps: int = 100, tolerance: float = 1e-5) -> float:
    """
    The distance between the orbits of two models, relative to their size: `|w_a - w_b| / sqrt((|w_a|² + |w_b|²) / 2)`
    for balanced, aligned weights.

    Zero up to rounding if one is the other in disguise; `sqrt(2)` if nothing in them matches. The same for all members
    of an orbit. An upper bound, as the search may end in a local minimum.
    """
    return find_alignment(a, b, max_sweeps=max_sweeps, tolerance=tolerance).distance


@torch.no_grad()
def find_alignment(
    model: nn.Module,
    reference: nn.Module,
    *,
    max_sweeps: int = 100,
    tolerance: float = 1e-5,
    hopeless: float = float("inf"),
    progress: bool = False,
) -> Alignment:
    """As [`align`], with all that was learned on the way; the first sweep is the last if it ends beyond `hopeless`."""
    check_alike(model.config, reference.config)
    check_same_parameters(model, reference)
    dtype = torch.promote_types(torch.promote_types(model.dtype, reference.dtype), torch.float32)
    with tqdm(total=max_sweeps, desc="Aligning", unit="sweep", disable=not progress) as bar:
        limits = max_sweeps, tolerance, bar, hopeless
        found = _find_alignment(model, reference, dtype, LONE, *limits)
        if dtype == torch.float64 and found.distance < EXACT:
            # The short length costs digits, and without rounding between the models nothing speaks for it.
            exact = _find_alignment(model, reference, dtype, 1.0, *limits)
            if exact.distance < EXACT:
                exact.distances = found.distances + exact.distances[-1:]
                return exact
    return found


def _find_alignment(
    model: nn.Module,
    reference: nn.Module,
    dtype: torch.dtype,
    lone: float,
    max_sweeps: int,
    tolerance: float,
    bar: tqdm,
    hopeless: float,
) -> Alignment:
    config = reference.config
    from_model, weights = _balanced(model, dtype, lone)
    from_reference, target = _balanced(reference, dtype, lone)
    search = Search(config, weights, target)
    search.turn_by_tokens()
    # Which heads and neurons belong together is found in the models' own precision, the angles in float64.
    distances, converged = search.run(max_sweeps, FOUND if dtype != torch.float64 else tolerance, bar, hopeless)
    if dtype != torch.float64:
        from_model = search.total @ from_model
        weights = from_model.state_dict(weights_of(model))
        target = from_reference.state_dict(weights_of(reference))
        search = Search(config, weights, target)
        if distances[-1] < min(1.0, hopeless):  # beyond, there are no angles worth more digits
            polished, converged = search.run(max_sweeps, tolerance, bar, hopeless, match=False)
            distances += polished
    total = from_reference.inverse() @ search.total @ from_model
    # Through the transformation that is returned: on the way rounding has added up where lengths are short.
    aligned = (from_reference @ total).state_dict(weights_of(model))
    return Alignment(total, from_reference, aligned, target, distances, converged)


def _balanced(model: nn.Module, dtype: torch.dtype, lone: float) -> tuple[GaugeTransformation, Weights]:
    transformation, weights = balance(model.config, weights_of(model), lone=lone)
    return transformation, {name: tensor.to(dtype) for name, tensor in weights.items()}


def check_alike(a: RiGPTConfig, b: RiGPTConfig) -> None:
    """
    Raise if two configurations do not have the same frames and parameters.

    Raises:
        ValueError: names the first field in which they differ.
    """
    for name in STRUCTURE:
        first, second = getattr(a, name), getattr(b, name)
        if first != second:
            raise ValueError(
                f"`reference` must have the same `{name}` as `model`, got {second!r} and {first!r}. Models of "
                "different shape share no gauge group; compare models made from one configuration."
            )


def check_same_parameters(a: nn.Module, b: nn.Module) -> None:
    """
    Raise if two models of one configuration do not have the same parameters: heads of two kinds, or an adapter.

    Raises:
        ValueError: names the first parameter that only one of them has.
    """
    first, second = (dict(model.named_parameters()).keys() for model in (a, b))
    differing = sorted(first ^ second)
    if differing:
        owner = "model" if differing[0] in first else "reference"
        raise ValueError(
            f"`model` and `reference` must have the same parameters, got {differing[0]!r} in `{owner}` only. Compare "
            "models with heads of one kind, and merge adapters first."
        )


# A sweep that lowers the distance by less than this part of it finds no more heads or neurons.
FOUND = 1e-3
# Weights that nothing reads, or that read nothing, must not count: with the slightest noise on their other side their
# least norm would be near zero.
LONE = 1e-2
# A distance below this is rounding in float64.
EXACT = 1e-8
# What neither shapes of parameters, nor the groups that act on them, nor what weights compute depends on.
INCIDENTAL = {
    "initializer_range",
    "attention_dropout",
    "residual_dropout",
    "embedding_dropout",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
STRUCTURE = tuple(name for name in RiGPTConfig.__annotations__ if name not in INCIDENTAL)


@contextmanager
def one_thread() -> Iterator[None]:
    """Many small decompositions take many times longer if each is shared among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Search:
    """Balanced weights on their way to a target; `total` is the way so far."""

    def __init__(self, config: RiGPTConfig, weights: Weights, target: Weights):
        self.config, self.weights, self.target = config, weights, target
        self.dtype = next(iter(target.values())).dtype
        self.total = GaugeTransformation.identity(config)
        self.frames = frame_keys(config)
        self.table = axes(config)
        self.compared = list(without_transports(target))
        sides = [side[name] for side in (weights, target) for name in self.compared]
        self.norm = sum(float(tensor.square().sum()) for tensor in sides) / 2

    def distance(self) -> float:
        squared = sum(float((self.weights[name] - self.target[name]).square().sum()) for name in self.compared)
        return (squared / self.norm) ** 0.5

    def go(self, elements: dict[str, torch.Tensor]) -> None:
        step = GaugeTransformation(self.config, elements)
        self.weights, self.total = step.state_dict(self.weights, self.dtype), step @ self.total

    def run(
        self,
        max_sweeps: int,
        tolerance: float,
        bar: tqdm | None = None,
        hopeless: float = float("inf"),
        match: bool = True,
    ) -> tuple[list[float], bool]:
        """Sweep until that changes nothing to speak of; the distances before and after every sweep, and whether."""
        distances = [self.distance()]
        while len(distances) <= max_sweeps:
            before = self.total
            self.sweep(match)
            distances.append(self.distance())
            if bar is not None:
                bar.set_postfix_str(f"distance {distances[-1]:.3g}")
                bar.update()
            if distances[-1] > distances[-2]:  # by rounding, at the end
                step_back = before @ self.total.inverse()
                self.weights, self.total = step_back.state_dict(self.weights, self.dtype), before
                return distances[:-1], True
            if distances[-2] - distances[-1] <= tolerance * distances[-1]:
                return distances, True
            if distances[-1] > hopeless:
                break
        return distances, False

    def sweep(self, match: bool = True) -> None:
        """Every frame once; `match`: those of heads and neurons too."""
        self.turn_spaces("lexical", "output")
        if match:
            with one_thread():
                self.go({key: self.match_heads(key) for key in self.keys("heads")})
        self.turn_spaces("head_qk", "head_vo")
        if match:
            self.go({key: self.match_neurons(key) for key in self.keys("neurons")})
        self.turn_stream()

    def keys(self, *kinds: str) -> list[str]:
        return [key for key in self.frames if kind_of(key) in kinds]

    def turn_by_tokens(self) -> None:
        """The stream's rotation by what tokens and positions put into it."""
        cross = token_vectors(self.target).T @ token_vectors(self.weights)
        group = self.frames["stream"].group
        assert isinstance(group, MatrixGroup)
        self.go(along(self.config, nearest(group, cross[None].double())[0]))

    def turn_stream(self) -> None:
        """The stream's frame, and with it those of the layers where they have their own."""
        ours, theirs = without_transports(self.weights), without_transports(self.target)
        wanted = self.keys("stream", "local")
        found = contract(self.config, theirs, ours, lambda key: key in wanted)
        cross = torch.stack([part for roles in found.values() for part in roles.values()]).sum(dim=0)
        group = self.frames["stream"].group
        assert isinstance(group, MatrixGroup)
        self.go(along(self.config, nearest(group, cross.double())[0]))

    def turn_spaces(self, *kinds: str) -> None:
        elements = {}
        wanted = self.keys(*kinds)
        for key, roles in contract(self.config, self.target, self.weights, lambda key: key in wanted).items():
            group = self.frames[key].group
            assert isinstance(group, MatrixGroup)
            elements[key] = nearest(group, (roles["vector"] + roles["covector"]).double(), roles.get("planes"))
        self.go(elements)

    def carriers(self, key: str, kind: str) -> list[tuple[str, int, str]]:
        """Parameters of a layer that carry both the frame `key` and one of another kind: name, axis, role in `key`."""
        found = []
        for name in self.target:
            if layer_of(name) != prefix_of(key):
                continue
            for dim, axis in enumerate(row(name, self.table)[0]):
                roles = {turn.frame: turn.role for turn in axis}
                if kind_of(key) in roles and roles.get(kind) in ("vector", "covector"):
                    found.append((name, dim, roles[kind_of(key)]))
        return found

    def match_heads(self, key: str) -> torch.Tensor:
        """
        The permutation of heads that gains most once each pair is rotated into each other.

        The gain of a pair of key-value heads is exact; which query heads inside them belong together is judged before
        by the products of queries and keys, and of values and outputs, which no rotation changes.
        """
        group = self.frames[key].group
        assert isinstance(group, HeadPermutations)
        heads, repeats = group.key_value_heads, group.repeats
        kinds = ("head_qk", "head_vo")
        cross = {kind: self._cross_blocks(key, kind, group) for kind in kinds}
        inside = torch.arange(repeats).repeat(heads, heads, 1)
        if repeats > 1:
            likeness = torch.zeros(heads, heads, repeats, repeats, dtype=self.dtype)
            for shared, queries in cross.values():
                part = torch.einsum("klij,kglmij->klgm", shared, queries)
                likeness += part / part.abs().max().clamp_min(torch.finfo(part.dtype).tiny)
            inside = torch.stack([torch.stack([assignment(gains) for gains in rows]) for rows in likeness])
        gains = torch.zeros(heads, heads, dtype=self.dtype)
        for kind, (shared, queries) in cross.items():
            space = self.frames[prefix_of(key) + kind].group
            assert isinstance(space, MatrixGroup)
            index = inside[:, :, :, None, None, None].expand(*inside.shape, 1, *shared.shape[-2:])
            chosen = queries.permute(0, 2, 1, 3, 4, 5).gather(3, index)[:, :, :, 0].sum(2)
            gains += largest_trace(space, shared + chosen)
        order = assignment(gains)
        return group.from_parts(order, inside[torch.arange(heads), order])

    def _cross_blocks(self, key: str, kind: str, group: HeadPermutations) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `Σ b aᵀ` between all pairs of heads: what key-value heads carry `[K, K, n, n]`, what query heads carry
        `[K, G, K, G, n, n]`.
        """
        heads, repeats = group.key_value_heads, group.repeats
        size = self.config.head_dim
        shared = torch.zeros(heads, heads, size, size, dtype=self.dtype)
        queries = torch.zeros(heads, repeats, heads, repeats, size, size, dtype=self.dtype)
        for name, dim, role in self.carriers(key, kind):
            length = self.target[name].shape[dim]
            b, a = (side[name].movedim(dim, 0).reshape(length, -1) for side in (self.target, self.weights))
            cross = b @ a.T
            if role == "query":
                blocks = cross.reshape(heads, repeats, size, heads, repeats, size)
                queries += blocks.permute(0, 1, 3, 4, 2, 5)
            else:
                shared += cross.reshape(heads, size, heads, size).transpose(1, 2)
        return shared, queries

    def match_neurons(self, key: str) -> torch.Tensor:
        """The permutation of neurons, and of the signs that a gated MLP allows, that gains most."""
        group = self.frames[key].group
        assert isinstance(group, NeuronGroup)
        fixed = torch.zeros(group.n, group.n)
        signed = torch.zeros(group.n, group.n)
        for name in self.target:
            if layer_of(name) != prefix_of(key):
                continue
            for dim, axis in enumerate(row(name, self.table)[0]):
                for turn in axis:
                    if turn.frame == kind_of(key):
                        b, a = (
                            side[name].movedim(dim, 0).reshape(group.n, -1).float()
                            for side in (self.target, self.weights)
                        )
                        likeness = fixed if not group.gated or turn.role == "active" else signed
                        likeness.addmm_(b, a.T)
        order = assignment(fixed + signed.abs())
        signs = signed.gather(1, order[:, None])[:, 0]
        # A sign belongs to the neuron that is taken, which is scaled before it moves.
        signs = torch.where(signs < 0, -1.0, 1.0)[order.argsort()]
        return group.element(order, torch.ones(group.n), signs if group.gated else torch.ones(group.n))
