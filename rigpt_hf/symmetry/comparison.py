"""
Was one model made from another? In numbers, words and a picture.

First the fingerprints of both say how likely that is, whatever their shapes (`fingerprint.py`), with probes that the
weights of both choose, so that nobody could have prepared for them. Where one
configuration holds both, the transformation is looked for that brings A to B (`layered.py`), and three distances are
held against each other, between balanced weights and relative to their size: what is left once A is there; what
rounding to the stored precision would cause by itself; and what is left of noise of the same spectra, since a search
over rotations and permutations finds some likeness anywhere.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..checkpoints.opened import OpenedModel
from .action import GaugeTransformation
from .common_form import in_common_form
from .expectation import chance, rounding, unaligned
from .fingerprint import Fingerprint, fingerprint, salt_of
from .given import Model, given
from .layered import ALGEBRA, search_layers
from .rates import related


# A distance of at most so many times what one rounding causes is rounding: a disguise may be rounded twice or more.
ROUNDINGS = 3.0
# Closer than this no chance brings the layers of two models.
CLEARLY_RELATED = 0.7
# Relatives come closer than this share of what chance achieves. The layers of models trained independently on one text
# come to 0.86 to 0.90 of it, and their token tables much closer: those show the text (see
# `evaluation/experiments/merging.py`).
CHANCE_MARGIN = 0.8
# Sweeps at most for the related; after the first, those farther apart than this are held against chance instead.
SWEEPS, STOP_ABOVE = 50, 0.9
# Models whose fingerprints are farther apart are not searched: no relative that a search would find is.
HOPELESS = 0.97
SEARCHES = ("auto", "always", "never")
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
        fingerprint (`float`): the distance of the fingerprints, see [`Fingerprint.distance`]; layers_apart
            (`list[float]`): the same of every layer of the shorter model and its match in the longer one.
        incomparable (`str`, *optional*): why no one configuration holds both, so that fingerprints alone decide.
        notes (`list[str]`): what was left out of one of them, or must be known of it.
        total (`Part`, *optional*): over all weights; layers (`Part`, *optional*): over those of the layers, as token
            tables resemble each other wherever the text is the same. `None` where nothing was searched for.
        parts (`list[Part]`): per part of the network.
        precision (`list[str]`): the coarsest dtypes that hold the weights of A and of B exactly.
        turned (`dict[str, str]`): what the alignment does in each kind of frame, in words.
        transformation (`GaugeTransformation`, *optional*): brings A to B, in their common configuration.
        sweeps (`int`): rounds of the search.
    """

    fingerprint: float
    layers_apart: list[float]
    verdict: str = "unrelated"
    incomparable: str | None = None
    notes: list[str] = field(default_factory=list)
    total: Part | None = None
    layers: Part | None = None
    parts: list[Part] = field(default_factory=list)
    precision: list[str] = field(default_factory=list)
    turned: dict[str, str] = field(default_factory=dict)
    transformation: GaugeTransformation | None = field(default=None, repr=False)
    sweeps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the transformation, as JSON can hold it."""
        values = {name: value for name, value in vars(self).items() if name != "transformation"}
        for name in ("total", "layers"):
            values[name] = None if values[name] is None else asdict(values[name])
        return values | {"meaning": VERDICTS[self.verdict], "parts": [asdict(part) for part in self.parts]}


@torch.no_grad()
def compare(a: Model, b: Model, *, seed: int = 0, search: str = "auto", progress: bool = False) -> Comparison:
    """
    Say whether B was made from A.

    Args:
        a, b: RiGPTs in memory, or folders, files and ids of models that convert; neither is changed.
        seed: Seed of the noise that stands for chance.
        search: `"auto"`: look for what brings A to B where the fingerprints leave hope; `"always"`, or `"never"`.
        progress: Show progress bars.

    Raises:
        ValueError: if one of them is no such model, or `search` is none of these.
    """
    if search not in SEARCHES:
        raise ValueError(f"`search` must be one of {', '.join(SEARCHES)}, got {search!r}.")
    first, second = given(a), given(b)
    salt = salt_of(first, second)
    prints: list[Fingerprint] = [fingerprint(side, salt=salt, progress=progress) for side in (first, second)]
    result = Comparison(prints[0].distance(prints[1]), (1 - prints[0].similarities(prints[1])).tolist())
    result.notes += [*first.notes, *second.notes]
    if result.fingerprint < related():
        result.verdict = "relative"
    try:
        first, second, notes = in_common_form(first, second)
    except ValueError as error:
        result.incomparable = str(error)
        return result
    result.notes += notes
    if search == "always" or (search == "auto" and result.fingerprint < HOPELESS):
        _search(result, first, second, seed, progress)
    return result


def _search(result: Comparison, a: OpenedModel, b: OpenedModel, seed: int, progress: bool) -> None:
    """Look for what brings A to B, and fill in what that tells."""
    before, precisions, is_same = unaligned(a, b)
    result.precision = [str(precision).removeprefix("torch.") for precision in precisions]
    if is_same:
        parts = {name: Part(name, 0.0, 0.0) for name in before}
        result.verdict, result.transformation = "same", GaugeTransformation.identity(b.config)
        result.turned, result.total, result.layers = (
            describe(result.transformation),
            parts.pop("all"),
            parts.pop("layers"),
        )
        result.parts = list(parts.values())
        return
    working = [torch.promote_types(precision, torch.float32) for precision in precisions]
    found = search_layers(
        a, b, torch.promote_types(*working), max_sweeps=SWEEPS, stop_above=STOP_ABOVE, progress=progress
    )
    parts = {name: Part(name, distance, before[name]) for name, distance in found.parts.items()}
    total, layers = parts.pop("all"), parts.pop("layers")
    floor = ALGEBRA * max(torch.finfo(dtype).eps for dtype in working)
    everything = {**parts, "all": total, "layers": layers}
    if floor < total.distance < ALGEBRA * max(torch.finfo(precision).eps for precision in precisions):
        for name, value in rounding(found, b, precisions).items():
            everything[name].rounding = value
    if layers.distance >= CLEARLY_RELATED:
        for name, value in chance(found, seed).items():
            everything[name].chance = value
    result.total, result.layers, result.parts = total, layers, list(parts.values())
    result.sweeps, result.transformation = len(found.distances), found.transformation
    result.turned = describe(found.transformation)
    if total.distance <= max(ROUNDINGS * (total.rounding or 0.0), floor):
        result.verdict = "disguise"
    elif layers.chance is None or layers.distance < CHANCE_MARGIN * layers.chance:
        result.verdict = "relative"


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
