"""
Learned alignment: the gauge transformation after which the loss of the models between two is least, found on text.

It starts from the nearest weights (`alignment.py`) and descends the loss half way between the two, by the pairing of
its gradient with every generator of the gauge group (`conservation.py`), which says how the loss changes when one end
turns, stretches or shifts. Half way it says most: near the ends the pairing is zero by Noether, or noise. Neurons are
exchanged by an assignment to latent weights that the gradient moves straight through it, as in Git Re-Basin's
estimator (arXiv 2209.04836); their places are permutations throughout.

Learned alignments of transformers: Theus et al., NeurIPS 2025 (arXiv 2506.22712), of one end at random points of the
path; Li and Shen, arXiv 2606.23607, of both ends. Here one end is as good as both: a gauge transformation acts on
weights by an affine map, so that `(1-t) h b + t g a` is `(1-t) b + t h⁻¹g a` transformed by `h`, and has its loss.

Every copy of a frame has one second moment, whatever its coordinates. Together with balanced weights this makes the
outcome the same for all disguises of the two models, up to rounding.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from ..frames import FrameKey
from .action import GaugeTransformation
from .alignment import Alignment, Search, find_alignment
from .conservation import translation_pairing
from .contraction import View, Weights, decomposable, views, weights_of
from .local_frames import along, without_transports


# Averages of the gradient and of its square forget this part of the past at every step.
BETAS = 0.9, 0.99
# Pairings with generators that are smaller than this part of what they could be turn frames by less than a step: they
# vanish where the two ends are one model, up to rounding.
FLOOR = 1e-3
# The step of latent weights, as part of that of frames.
LATENT = 0.15
# The exchanges that are learned. Heads keep the places that alignment found: exchanged, they would have to be turned
# into each other anew.
EXCHANGED = ("neurons", "expert_neurons", "shared_neurons")


@dataclass(frozen=True)
class Learning:
    """
    How an alignment is learned.

    Args:
        batches (`Sequence[torch.Tensor]`): token ids `[batch, seq]`; one is used for each step, from the first again
            after the last. Losses should be measured on other text.
        steps (`int`): number of steps.
        learning_rate (`float`): root mean square of a frame's generator in the first step; it falls along a cosine.

    Raises:
        ValueError: if there are no batches, or steps and learning rate are not positive.
    """

    batches: Sequence[torch.Tensor]
    steps: int = 400
    learning_rate: float = 0.03

    def __post_init__(self):
        if not len(self.batches):
            raise ValueError("`batches` must hold at least one batch of token ids, got none. Give a longer text.")
        shapes = [tuple(batch.shape) for batch in self.batches if batch.dim() != 2 or batch.shape[1] < 2]
        if shapes:
            raise ValueError(
                f"`batches` must be token ids [batch, seq] with at least two to a row, got the shape {shapes[0]}. "
                "Cut the text into windows."
            )
        for name in ("steps", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}. Take another.")


def learn_alignment(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[torch.Tensor],
    *,
    steps: int = 400,
    learning_rate: float = 0.03,
    progress: bool = False,
) -> GaugeTransformation:
    """
    The transformation that brings `model` where the path to `reference` has the least loss on text:
    `learn_alignment(a, b, batches)(a)` is `a`, exactly, in other frames.

    Args:
        model, reference: Two RiGPTs of one configuration that predict tokens; neither is changed.
        batches, steps, learning_rate: See [`Learning`].
        progress: Show progress bars.

    Raises:
        ValueError: if the two have different shapes or options, or a setting is impossible.
    """
    learning = Learning(batches, steps, learning_rate)
    return find_learned_alignment(model, reference, learning, progress=progress).transformation


@torch.no_grad()
@decomposable()
def find_learned_alignment(
    model: nn.Module, reference: nn.Module, learning: Learning, *, progress: bool = False
) -> Alignment:
    """As [`learn_alignment`], with all that was learned meanwhile; distances are those before and after."""
    if reference.get_output_embeddings() is None:
        raise ValueError(
            f"`reference` must predict tokens, whose loss is descended, got {type(reference).__name__}. Align without "
            "learning."
        )
    start = find_alignment(model, reference, progress=progress)
    learner = Learner(reference, start, learning)
    with tqdm(total=learning.steps, desc="Learning the alignment", unit="step", disable=not progress) as bar:
        for step in range(learning.steps):
            learner.step(step)
            bar.set_postfix_str(f"loss {learner.losses[-1]:.3f}", refresh=False)
            bar.update()
    back = start.to_balanced.inverse()
    total = back @ learner.total @ start.to_balanced @ start.transformation
    aligned = (start.to_balanced @ total).state_dict(weights_of(model))
    distances = [start.distance, learner.distance()]
    return Alignment(total, start.to_balanced, aligned, start.reference, distances, True, learner.losses)


class Learner(Search):
    """Balanced, aligned weights on their way to a path of less loss; `losses` are those at the points of the path."""

    def __init__(self, reference: nn.Module, start: Alignment, learning: Learning):
        super().__init__(reference.config, start.aligned, start.reference)
        self.learning, self.losses = learning, list[float]()
        # Of its own, without dropout, and in a precision in which small steps are not lost.
        self.between = copy.deepcopy(reference).eval().requires_grad_(True)
        self.between.to(torch.promote_types(reference.dtype, torch.float32))
        self.moments: dict[object, Moments] = {}
        self.size = math.sqrt(self.norm / sum(self.target[name].numel() for name in self.compared))
        self.exchanged = [key for key in self.table.frames if key.kind in EXCHANGED]
        carriers = {name for key in self.exchanged for name, _ in self.table.carriers(key)}
        self.latent = {name: weight for name, weight in self.target.items() if name in carriers}

    def step(self, number: int) -> None:
        """One step of descent: all frames that can move do, then neurons change places."""
        learning = self.learning
        rate = learning.learning_rate * (1 + math.cos(math.pi * number / learning.steps)) / 2
        gradient = self.gradient(learning.batches[number % len(learning.batches)])
        elements: dict[FrameKey, torch.Tensor] = {}
        for key, pairing, largest in self.pairings(gradient):
            frame = self.table.frames[key]
            floor = FLOOR * largest / math.sqrt(pairing.numel())
            direction = self.moments.setdefault(key, Moments()).direction(pairing, floor)
            if frame.shift is not None:  # a weight, and no angle
                direction = direction * self.size
            element = frame.group.exp(-rate * direction)
            elements |= along(self.table, element) if key in self.table.streams else {key: element}
        self.go(elements)
        self.exchange(gradient, LATENT * rate)

    @torch.no_grad()
    def gradient(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of the loss half way, in float64."""
        parameters = dict(self.between.named_parameters())
        for name, parameter in parameters.items():
            parameter.copy_((self.target[name] + self.weights[name]) / 2)
        input_ids = input_ids.to(self.between.device)
        with torch.enable_grad():
            loss = self.between(input_ids, labels=input_ids, use_cache=False).loss
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise ValueError(
                f"`learning_rate` must keep the loss finite, got {self.losses[-1]} after {len(self.losses)} steps "
                f"with {self.learning.learning_rate:g}. Take a smaller one, or see whether a model is damaged."
            )
        return {name: value.to("cpu", torch.float64) for name, value in zip(parameters, found, strict=True)}

    def pairings(self, gradient: Weights) -> Iterator[tuple[FrameKey, torch.Tensor, float]]:
        """
        How the loss changes along every generator, in the Lie algebra, and the norm that this could have; frames of
        the residual stream turn as one.
        """
        sizes = {name: float(value.norm()) for name, value in gradient.items()}
        table = self.table
        stream = View(table, table.streams, without_transports(gradient), without_transports(self.weights))
        own = [key for key, frame in table.frames.items() if frame.group.dimension and key not in table.streams]
        for view in (stream, *views(table, gradient, self.weights, own)):
            shared = view is stream
            pairing = view.group.project(view.total()) if shared else view.group.generator(view.grams)
            names = {name for key in view.keys for name, _ in view.walk(key)}
            yield view.key, pairing, sum(sizes[name] * float(self.weights[name].norm()) for name in names)
        for key, shift in table.shifts.items():
            if not shift.constant:  # else it shifts what is half way, too, and the loss stays
                with torch.enable_grad():
                    pairing = translation_pairing(self.config, key, gradient, self.weights)
                yield key, pairing, math.hypot(*sizes.values())

    def exchange(self, gradient: Weights, rate: float) -> None:
        """Move latent weights against the gradient, and neurons to the places where they are nearest to them."""
        for name, latent in self.latent.items():
            direction = self.moments.setdefault(name, Moments()).direction(gradient[name][None])[0]
            self.latent[name] = latent - rate * direction
        seen = views(self.table, self.latent, self.weights, self.exchanged)
        self.go({view.key: view.group.nearest(view) for view in seen})


@dataclass
class Moments:
    """Running means of what is given, and of its mean square over all but the first axis."""

    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    square: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def direction(self, value: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
        """The mean in units of the root of the other, both as if they had no beginning (Adam, arXiv 1412.6980)."""
        self.count += 1
        squares = value.square().flatten(1).mean(1).reshape(-1, *[1] * (value.dim() - 1))
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * value
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * squares
        size = (self.square / (1 - BETAS[1] ** self.count)).sqrt() + floor
        return self.mean / (1 - BETAS[0] ** self.count) / size.clamp_min(torch.finfo(value.dtype).tiny)
