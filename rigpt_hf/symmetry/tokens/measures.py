"""How nearly a model has a symmetry of its tokens: as a function, as weights, and up to a gauge transformation."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ..alignment import gauge_distance
from .representation import Representation
from .symmetry import TokenSymmetry


@dataclass(frozen=True)
class SymmetryError:
    """
    How far a function is from `f(π x) = π f(x)`, over the generators.

    Args:
        max, mean: Of the differences of log-probabilities of all tokens at all places, in nats.
    """

    max: float
    mean: float


@dataclass(frozen=True)
class LearnedSymmetry:
    """
    How much a model that was never told has of a symmetry.

    Args:
        function: As of [`symmetry_error`].
        gauge_distances: By generator the distance from the model to itself with its tokens relabelled, see
            [`gauge_distance`]: 0 if relabelling is a gauge transformation of it, `sqrt(2)` if nothing matches.
    """

    function: SymmetryError
    gauge_distances: tuple[float, ...]


@torch.no_grad()
def symmetry_error(model: nn.Module, symmetry: TokenSymmetry, input_ids: torch.Tensor) -> SymmetryError:
    """
    How far a causal language model is from having a symmetry, as a function of `input_ids` `[B, S]`.

    Zero up to rounding for a model that has it, in any representation; any causal model of that vocabulary is taken.
    """
    symmetry.check_vocabulary(model.config)
    training, largest, total = model.training, 0.0, 0.0
    model.eval()
    plain = model(input_ids=input_ids, use_cache=False).logits.double().log_softmax(-1)
    for permutation in symmetry.permutations.to(input_ids.device):
        moved = model(input_ids=permutation[input_ids], use_cache=False).logits.double().log_softmax(-1)
        difference = (moved[..., permutation] - plain[..., : symmetry.vocab_size]).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.mean())
    model.train(training)
    return SymmetryError(largest, total / len(symmetry.permutations))


@torch.no_grad()
def learned_symmetry(model: nn.Module, symmetry: TokenSymmetry, input_ids: torch.Tensor) -> LearnedSymmetry:
    """How far a RiGPT that was never told of a symmetry is from having it, as a function and as weights."""
    identity = Representation.trivial(model.config, symmetry)
    distances = []
    for number in range(len(symmetry.generators)):
        relabelled = copy.deepcopy(model)
        for name, parameter in relabelled.named_parameters():
            parameter.copy_(identity.relabelled(number, name, parameter))
        distances.append(gauge_distance(relabelled, model))
    return LearnedSymmetry(symmetry_error(model, symmetry, input_ids), tuple(distances))


def symmetrize(model: nn.Module, representation: Representation) -> nn.Module:
    """
    A copy of a RiGPT with the symmetry: each parameter projected, with the norm that it had.

    Its config records the representation, but for one with a frame: `Representation.save` does that in a folder.
    """
    symmetric = representation.project_(copy.deepcopy(model), keep_norms=True)
    recordable = representation.filling is not None and representation.frame is None
    symmetric.config.token_symmetry = representation.to_config() if recordable else None
    return symmetric
