"""
Aligning one model with another: the gauge transformation after which their weights are nearest.

Both are balanced first, which leaves rotations, reflections and permutations (`balance.py`). Over these the distance
is made smaller by turns: orthogonal Procrustes for the stream and the spaces of tokens and heads, assignment for heads
and neurons, each solved while the others rest, until nothing improves. The start decides which local minimum is found:
it is the tokens, whose order is the same in both models.

Related: Git Re-Basin (arXiv 2209.04836) matches permutations; here the rotations that a RiGPT allows come first.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from ..configuration_rigpt import SIZES, RiGPTConfig
from ..frames import FrameKey, is_choice_of_frames, table_of
from ..rope_rigpt import LENGTH_DEPENDENT_ROPE_TYPES, rope_types
from .action import GaugeTransformation
from .balance import balance
from .contraction import ENTRY, UNBALANCED, View, Weights, decomposable, token_vectors, views, weights_of
from .local_frames import along, without_transports
from .progress import bar_to


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
        losses (`list[float]`): before every step of a learned alignment; see `learned_alignment.py`.
    """

    transformation: GaugeTransformation
    to_balanced: GaugeTransformation
    aligned: Weights
    reference: Weights
    distances: list[float] = field(default_factory=list)
    converged: bool = False
    losses: list[float] = field(default_factory=list)

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
    settings = {"max_sweeps": max_sweeps, "tolerance": tolerance, "progress": progress}
    return find_alignment(model, reference, **settings).transformation


def gauge_distance(a: nn.Module, b: nn.Module, *, max_sweeps: int = 100, tolerance: float = 1e-5) -> float:
    """
    The distance between the orbits of two models, relative to their size: `|w_a - w_b| / sqrt((|w_a|² + |w_b|²) / 2)`
    for balanced, aligned weights.

    Zero up to rounding if one is the other in disguise; `sqrt(2)` if nothing in them matches. The same for all members
    of an orbit. An upper bound, as the search may end in a local minimum.
    """
    return find_alignment(a, b, max_sweeps=max_sweeps, tolerance=tolerance).distance


@torch.no_grad()
@decomposable()
def find_alignment(
    model: nn.Module,
    reference: nn.Module,
    *,
    max_sweeps: int = 100,
    tolerance: float = 1e-5,
    stop_above: float = float("inf"),
    progress: bool = False,
) -> Alignment:
    """As [`align`], with all that was learned meanwhile; the first sweep is the last if it ends above `stop_above`."""
    check_alike(model.config, reference.config)
    check_same_parameters(model, reference)
    dtype = torch.promote_types(torch.promote_types(model.dtype, reference.dtype), torch.float32)
    with bar_to(max_sweeps, "Aligning", "sweep", progress) as bar:
        limits = max_sweeps, tolerance, bar, stop_above
        alignment = _find_alignment(model, reference, dtype, UNPAIRED, *limits)
        if dtype == torch.float64 and alignment.distance < EXACT:
            # The short length costs digits, and without rounding between the models nothing speaks for it.
            exact = _find_alignment(model, reference, dtype, 1.0, *limits)
            if exact.distance < EXACT:
                exact.distances = alignment.distances + exact.distances[-1:]
                return exact
    return alignment


def _find_alignment(
    model: nn.Module,
    reference: nn.Module,
    dtype: torch.dtype,
    unpaired: float,
    max_sweeps: int,
    tolerance: float,
    bar: tqdm,
    stop_above: float,
) -> Alignment:
    config = reference.config
    from_model, weights = balance(model.config, weights_of(model), unpaired=unpaired)
    from_reference, target = balance(config, weights_of(reference), unpaired=unpaired)
    search = Search(config, *in_range(dtype, weights, target))
    del weights  # each copy of which, here and below, is as large as both models are in float32
    search.turn_by_tokens()
    # Heads and neurons are matched in the models' own precision, angles are found in float64.
    distances, converged = search.run(max_sweeps, FOUND if dtype != torch.float64 else tolerance, bar, stop_above)
    if dtype != torch.float64:
        from_model = search.total @ from_model
        del search, target
        weights = from_model.state_dict(weights_of(model))
        target = from_reference.state_dict(weights_of(reference))
        search = Search(config, *in_range(torch.float64, weights, target))
        del weights
        if distances[-1] < min(1.0, stop_above):  # beyond, there are no angles worth more digits
            polished, converged = search.run(max_sweeps, tolerance, bar, stop_above, match=False)
            distances += polished
    total = from_reference.inverse() @ search.total @ from_model
    del search
    # Through the transformation that is returned: on the way rounding has added up where lengths are short.
    aligned = (from_reference @ total).state_dict(weights_of(model))
    return Alignment(total, from_reference, aligned, target, distances, converged)


def in_range(dtype: torch.dtype, *sides: Weights) -> list[Weights]:
    """
    Weights in float64 of several models, times one power of two by which their mean square is near 1, in a dtype.

    That changes no digit and nothing that an alignment finds. Neurons are matched by powers of weights, which very
    large or small ones would carry out of the range of the dtype.

    Raises:
        ValueError: if they have left the range of float64 before.
    """
    tensors = [tensor for side in sides for tensor in side.values()]
    size = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
    squares = sum(float((tensor / (size or 1)).square().sum()) for tensor in tensors)
    mean = size * (squares / max(sum(tensor.numel() for tensor in tensors), 1)) ** 0.5
    if not math.isfinite(mean):
        raise ValueError(UNBALANCED)
    power = torch.tensor(-math.frexp(mean)[1])
    return [{name: tensor.ldexp(power).to(dtype) for name, tensor in side.items()} for side in sides]


def check_alike(a: RiGPTConfig, b: RiGPTConfig, names: tuple[str, str] | None = None) -> None:
    """
    Raise if two configurations do not have the same frames and parameters.

    Args:
        a, b: Of `model` and `reference`.
        names: What a person calls the two, if messages shall say it.

    Raises:
        ValueError: names the first field in which they differ.
    """
    promised = is_promised(a) and is_promised(b)
    for name in dict.fromkeys(structure(a) + structure(b)):
        first, second = getattr(a, name, None), getattr(b, name, None)
        if first != second and not (promised and name == "max_position_embeddings"):
            reason = "Models of different shape share no gauge group"
            if name not in SIZES and name not in ("embedding_size", "tie_word_embeddings"):
                reason = "Under another option the same weights are another function"
            of_a, of_b = [f" in {one!r}" for one in names] if names else ("", "")
            raise ValueError(
                f"`model` and `reference` must have the same `{name}`, got {first!r}{of_a} and {second!r}{of_b}. "
                f"{reason}; compare models made from one configuration."
            )


def is_promised(config: RiGPTConfig) -> bool:
    """Whether the longest sequence is only a promise: no table and no frequency follows from it."""
    if config.position_embedding_type == "rotary":
        return not rope_types(config) & set(LENGTH_DEPENDENT_ROPE_TYPES)
    return config.position_embedding_type == "alibi"


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
UNPAIRED = 1e-2
# A distance below this is rounding in float64.
EXACT = 1e-8
# Options on which neither the shapes of parameters, nor their groups, nor the function of the weights depends.
INCIDENTAL = {
    "initializer_range",
    "attention_dropout",
    "residual_dropout",
    "embedding_dropout",
    "use_cache",
    "token_symmetry",
    "converted_from",
    "output_router_logits",
    "router_aux_loss_coef",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def structure(config: RiGPTConfig) -> list[str]:
    """All options but those that are declared incidental, of subclasses too."""
    kinds = [kind for kind in reversed(type(config).__mro__) if issubclass(kind, RiGPTConfig)]
    return [name for kind in kinds for name in vars(kind).get("__annotations__", {}) if name not in INCIDENTAL]


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Many small decompositions take many times longer if each is shared among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# The order in which a sweep goes through the frames.
SWEEP = (
    ("lexical", "output"),
    ("entry",),
    ("gains",),
    ("heads",),
    ("head_qk", "head_vo"),
    ("query_norm", "key_norm"),
    ("experts",),
    ("neurons", "expert_neurons", "shared_neurons"),
    ("stream", "local"),
)


class Search:
    """Balanced weights on their way to a target; `total` is the transformation so far."""

    def __init__(self, config: RiGPTConfig, weights: Weights, target: Weights):
        self.config, self.weights, self.target = config, weights, target
        self.dtype = next(iter(target.values())).dtype
        self.total = GaugeTransformation.identity(config)
        self.table = table_of(config)
        self.compared = [name for name in target if not is_choice_of_frames(name)]
        sides = [side[name] for side in (weights, target) for name in self.compared]
        self.norm = sum(float(tensor.square().sum()) for tensor in sides) / 2

    def distance(self) -> float:
        squared = sum(float((self.weights[name] - self.target[name]).square().sum()) for name in self.compared)
        return (squared / self.norm) ** 0.5 if squared else 0.0

    def go(self, elements: Mapping[FrameKey, torch.Tensor]) -> None:
        step = GaugeTransformation(self.config, elements)
        self.weights, self.total = step.state_dict(self.weights, self.dtype), step @ self.total

    def run(
        self,
        max_sweeps: int,
        tolerance: float,
        bar: tqdm | None = None,
        stop_above: float = float("inf"),
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
            if distances[-1] > stop_above:
                break
        return distances, False

    def sweep(self, match: bool = True, but: Collection[str] = ()) -> None:
        """Every frame once `but` those of some kinds; `match`: those of heads and neurons too."""
        for kinds in SWEEP:
            exchanges = any(frame.group.exchanges for key, frame in self.table.frames.items() if key.kind in kinds)
            if (match or not exchanges) and not set(kinds) & set(but):
                self.settle(*kinds)

    def settle(self, *kinds: str) -> None:
        """Bring the frames of these kinds to the target while all others rest."""
        with one_thread(kinds == ("heads",)):
            if "stream" in kinds:
                ours, theirs = (without_transports(side) for side in (self.weights, self.target))
                view = View(self.table, self.table.streams, theirs, ours)
                self.go(along(self.table, view.group.nearest(view)))
            else:
                self.go({view.key: view.group.nearest(view) for view in self.views(*kinds)})

    def views(self, *kinds: str) -> Iterator[View]:
        """Target and weights as seen from the frames of these kinds."""
        keys = [key for key in self.table.frames if key.kind in kinds]
        return views(self.table, self.target, self.weights, keys)

    def turn_by_tokens(self) -> None:
        """Turn the residual stream, and its beginning, by what tokens and positions put into it."""
        for kind in ("entry", "stream"):
            self.go(self.turn_of(kind))

    def turn_of(self, kind: str) -> dict[FrameKey, torch.Tensor]:
        """The rotation of the residual stream, or of its beginning, by what tokens and positions put into it."""
        if kind not in self.table.kinds:
            return {}
        target, ours = (token_vectors(self.table, side, kind) for side in (self.target, self.weights))
        element = self.table.kinds[kind].group.procrustes((target.T @ ours)[None].to("cpu", torch.float64))
        return {ENTRY: element} if kind == "entry" else along(self.table, element)
