"""
Is one model another in disguise, a relative of it, or neither? In numbers, words and a picture.

Three distances are held against each other, between balanced weights and relative to their size: after alignment;
what rounding to the stored precision would cause by itself; and what aligning with noise of the same spectra achieves,
since a search over rotations and permutations finds some likeness anywhere.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import is_choice_of_frames
from .action import GaugeTransformation
from .alignment import FOUND, UNPAIRED, Alignment, Search, find_alignment, in_range
from .balance import balance
from .contraction import Weights, weights_of


# A distance of at most so many times what one rounding causes is rounding: a disguise may be rounded twice or more.
ROUNDINGS = 3.0
# Algebra in the working precision loses so many units in the last place on its way through a few matrix products.
ALGEBRA = 100.0
# Closer than this no chance brings the layers of two models; up to it rounding is worth estimating.
CLEARLY_RELATED = 0.7
# Relatives come closer than this share of what chance achieves. The layers of models trained independently on one text
# come to 0.86 to 0.90 of it, and their token tables much closer: those show the text (see
# `evaluation/experiments/merging.py`).
CHANCE_MARGIN = 0.8
# Sweeps at most for the related; after the first, those farther apart than this are held against chance instead.
SWEEPS, STOP_ABOVE = 50, 0.9
VERDICTS = {
    "same": "B is A: every weight is equal.",
    "disguise": "B is A in disguise: the same function, other frames. What is left is rounding.",
    "relative": "B is a relative of A: fine-tuned or trained on from it, or from a common ancestor.",
    "unrelated": "B is unrelated to A: its layers are no closer than those of independently trained models.",
}


@dataclass
class Part:
    """
    One part of the models.

    Args:
        name (`str`): such as `layers.3.self_attn`.
        distance (`float`): after alignment; before (`float`): of the weights as they are.
        rounding (`float`, *optional*): what rounding explains; chance (`float`, *optional*): what noise achieves.
    """

    name: str
    distance: float
    before: float
    rounding: float | None = None
    chance: float | None = None


@dataclass
class Comparison:
    """
    The outcome of comparing B with A.

    Args:
        verdict (`str`): `same`, `disguise`, `relative` or `unrelated`.
        total (`Part`): over all weights; layers (`Part`): over those of the layers, on which the verdict between
            relatives and the unrelated rests, as token tables resemble each other wherever the text is the same.
        parts (`list[Part]`): per part of the network.
        precision (`list[str]`): the coarsest dtypes that hold the weights of A and of B exactly.
        turned (`dict[str, str]`): what the alignment does in each kind of frame, in words.
        transformation (`GaugeTransformation`): brings A to B.
        sweeps (`int`): rounds of the search.
    """

    verdict: str
    total: Part
    layers: Part
    parts: list[Part]
    precision: list[str]
    turned: dict[str, str]
    transformation: GaugeTransformation = field(repr=False)
    sweeps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the transformation, as JSON can hold it."""
        return {
            "verdict": self.verdict,
            "meaning": VERDICTS[self.verdict],
            "total": asdict(self.total),
            "layers": asdict(self.layers),
            "parts": [asdict(part) for part in self.parts],
            "precision": self.precision,
            "turned": self.turned,
            "sweeps": self.sweeps,
        }


@torch.no_grad()
def compare(a: Model, b: Model, *, seed: int = 0, search: str = "auto", progress: bool = False) -> Comparison:
    """
    Say whether B was made from A: by their fingerprints, and, where they are of one shape, by what is left once A is
    brought to B.

    Args:
        a, b: RiGPTs in memory, or folders, files and ids of models that convert; neither is changed.
        seed: Seed of the noise that stands for chance.
        search: `"auto"`: look for what brings A to B where fingerprints do not exclude it; `"always"`, `"never"`.
        progress: Show progress bars.

    Raises:
        ValueError: if one of them is no such model.
    """
    sides = [given(model) for model in (a, b)]
    prints = [fingerprint(side, progress=progress) for side in sides]
    near = prints[0].distance(prints[1])
    reason = why_not_alike(*sides)
    result = Comparison(near, layers_apart(*prints), reason)
    if reason is None and (search == "always" or (search == "auto" and near < HOPELESS)):
        _search(result, *sides, seed, progress)
    result.verdict = result.judge()
    return result


def _search(result: Comparison, a: Given, b: Given, seed: int, progress: bool) -> None:
    """Fill in what the search for a transformation tells."""
    before, precisions, same = unaligned(a, b)
    dtype = torch.promote_types(torch.promote_types(*precisions), torch.float32)
    found = search_layers(a, b, dtype, max_sweeps=SWEEPS, stop_above=STOP_ABOVE, progress=progress)
    parts = {name: Part(name, distance, before[name]) for name, distance in found.parts.items()}
    coarsest = max(torch.finfo(precision).eps for precision in precisions)
    floor = ALGEBRA * max(torch.finfo(torch.promote_types(each, torch.float32)).eps for each in precisions)
    if floor < parts["all"].distance < ALGEBRA * coarsest:
        for name, value in rounding(found, precisions).items():
            parts[name].rounding = value
    elif parts["layers"].distance >= CLEARLY_RELATED:
        for name, value in chance(found, seed).items():
            parts[name].chance = value
    result.total, result.layers = parts.pop("all"), parts.pop("layers")
    result.parts, result.sweeps = list(parts.values()), len(found.distances)
    result.precision = [str(precision).removeprefix("torch.") for precision in precisions]
    result.is_same, result.floor = same, floor
    result.transformation, result.turned = found.transformation, describe(found.transformation)


def stored_precision(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that holds all weights exactly: weights cast to more digits still have only the fewer."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(parameter.to(dtype).to(parameter.dtype), parameter) for parameter in parameters):
            return dtype
    return torch.float64


def _rounding(found: Alignment, b: nn.Module, precisions: list[torch.dtype]) -> dict[str, float]:
    """
    The distance that casting would cause: A in the frames of B to the precision of B, and the other way round.

    The coarser of the two decides; both count where they are alike.
    """
    in_frames_of_b = found.to_balanced.inverse().state_dict(found.aligned)
    in_frames_of_a = found.transformation.inverse().state_dict(weights_of(b))
    coarsest = max(torch.finfo(precision).eps for precision in precisions)
    squares: dict[str, float] = {}
    for precision, weights in zip(precisions, (in_frames_of_a, in_frames_of_b), strict=True):
        if 4 * torch.finfo(precision).eps < coarsest:
            continue
        for name, value in _cast_distances(found.transformation.config, weights, precision).items():
            squares[name] = squares.get(name, 0.0) + value**2
    return {name: square**0.5 for name, square in squares.items()}


def _cast_distances(config: RiGPTConfig, weights: Weights, precision: torch.dtype) -> dict[str, float]:
    """The distance between balanced forms before and after a cast, aligned again as balancing is not linear."""
    cast = {name: tensor.to(precision).to(torch.float64) for name, tensor in weights.items()}
    # In these frames weights may be larger than in those that they are stored in.
    rounded = {name: torch.where(tensor.isfinite(), tensor, weights[name]) for name, tensor in cast.items()}
    balanced = [balance(config, side, passes=1, unpaired=UNPAIRED)[1] for side in (rounded, weights)]
    search = Search(config, *in_range(torch.float64, *balanced))
    search.run(2, FOUND, match=False)
    return part_distances(search.weights, search.target)


def _chance(found: Alignment, dtype: torch.dtype, seed: int, sweeps: int) -> dict[str, float]:
    """The distance that as many sweeps reach between A and noise with the spectra of B's weights."""
    generator = torch.Generator().manual_seed(seed)
    working = torch.promote_types(dtype, torch.float32)
    scrambled = {}
    for name, tensor in found.reference.items():
        for dim in range(tensor.dim()):
            order = torch.randperm(tensor.shape[dim], generator=generator)
            signs = torch.where(torch.rand(tensor.shape[dim], generator=generator) < 0.5, -1.0, 1.0).to(tensor)
            tensor = (tensor.movedim(dim, -1)[..., order] * signs).movedim(-1, dim)
        scrambled[name] = tensor
    search = Search(found.transformation.config, *in_range(working, found.aligned, scrambled))
    search.turn_by_tokens()
    search.run(sweeps, FOUND)
    return part_distances(search.weights, search.target)


def describe(transformation: GaugeTransformation) -> dict[str, str]:
    """In words, how many copies of each kind of frame a transformation moves."""
    moved: dict[str, list[float]] = {}
    for key, frame, element in transformation.items():
        difference = (element - frame.group.identity(frame.copies)).double().flatten(1)
        scale = frame.group.identity(1).double().norm().clamp_min(1.0)
        moved.setdefault(key.kind, []).extend((difference.norm(dim=1) / scale).tolist())
    words = {}
    for kind in transformation.table.kinds:
        values = moved.get(kind, [])
        count = sum(value > 1e-2 for value in values)
        words[kind] = "as it was" if count == 0 else f"{count} of {len(values)} moved"
    return words
