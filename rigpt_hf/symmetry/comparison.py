"""
Was one model made from another? In numbers, words and a picture.

First the fingerprints of both say how likely that is, whatever their shapes (`fingerprint.py`), with probes that the
weights of both choose, so that nobody could have prepared for them. Where they
are relatives and one configuration holds both, the transformation is looked for that brings A to B (`layered.py`), and
two distances are held against each other, between balanced weights and relative to their size: what is left once A is
there, and what rounding to the stored precision would cause by itself. That distance is no measure of kinship, as a
search over rotations and permutations finds some likeness anywhere.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..checkpoints.opened import OpenedModel
from .action import GaugeTransformation
from .common_form import in_common_form
from .expectation import rounding, unaligned
from .fingerprint import Fingerprint, fingerprint, salt_of
from .given import Model, given
from .layered import ALGEBRA, Found, search_layers
from .rates import related


# A distance of at most so many times what one rounding causes is rounding: a disguise may be rounded twice or more.
ROUNDINGS = 3.0
# Canonical forms and other frames are computed in float64, and lose so much where eigenvalues are near each other.
FRAMES = ALGEBRA**2 * torch.finfo(torch.float64).eps
# Sweeps at most.
SWEEPS = 50
SEARCHES = ("auto", "always", "never")
VERDICTS = {
    "same": "B is A: every weight is equal.",
    "disguise": "B is A in disguise: the same function, other frames. What is left is rounding.",
    "relative": "B is a relative of A: made from it, or it from B, or both from a common ancestor.",
    "unrelated": "B is unrelated to A, as far as can be told: no nearer than independently trained models are.",
}
ROUNDED = "B is A: every weight is equal up to rounding."


@dataclass
class Part:
    """
    One part of the models.

    Args:
        name (`str`): such as `layers.3.self_attn`.
        distance (`float`): after alignment; before (`float`): of the weights as they are.
        rounding (`float`, *optional*): what rounding explains.
    """

    name: str
    distance: float
    before: float
    rounding: float | None = None


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
        limit (`float`, *optional*): the distance over all weights up to which rounding explains it.
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
    limit: float | None = None
    precision: list[str] = field(default_factory=list)
    turned: dict[str, str] = field(default_factory=dict)
    transformation: GaugeTransformation | None = field(default=None, repr=False)
    sweeps: int = 0

    @property
    def meaning(self) -> str:
        """What the verdict means, in words."""
        is_rounded = self.verdict == "same" and self.total is not None and self.total.before > 0
        return ROUNDED if is_rounded else VERDICTS[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the transformation, as JSON can hold it."""
        values = {name: value for name, value in vars(self).items() if name != "transformation"}
        for name in ("total", "layers"):
            values[name] = None if values[name] is None else asdict(values[name])
        return values | {"meaning": self.meaning, "parts": [asdict(part) for part in self.parts]}


@torch.no_grad()
def compare(
    a: Model,
    b: Model,
    *,
    search: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Comparison:
    """
    Say whether B was made from A.

    Args:
        a, b: RiGPTs in memory, or folders, files and ids of models that convert; neither is changed.
        search: `"auto"`: look for what brings A to B where the fingerprints are of relatives; `"always"`, `"never"`.
        device: Where to search, see [`search_layers`].
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
    if search == "always" or (search == "auto" and result.verdict == "relative"):
        _search(result, first, second, device, progress)
    return result


def _search(
    result: Comparison, a: OpenedModel, b: OpenedModel, device: torch.device | str | None, progress: bool
) -> None:
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
    found = search_between(a, b, device, progress)
    parts = {name: Part(name, distance, before[name]) for name, distance in found.parts.items()}
    total, layers = parts.pop("all"), parts.pop("layers")
    coarsest = max(torch.finfo(precision).eps for precision in precisions)
    floor = ALGEBRA * max(torch.finfo(torch.promote_types(each, torch.float32)).eps for each in precisions)
    everything = {**parts, "all": total, "layers": layers}
    if floor < total.distance < ALGEBRA * coarsest:
        for name, value in rounding(found, b, precisions).items():
            everything[name].rounding = value
    result.total, result.layers, result.parts = total, layers, list(parts.values())
    result.sweeps, result.transformation = len(found.distances), found.transformation
    # Far beyond rounding its scale will do.
    explained = coarsest if total.distance >= ALGEBRA * coarsest else total.rounding or 0.0
    result.limit = max(ROUNDINGS * explained, floor)
    if total.distance <= result.limit:
        result.verdict = "disguise"
        # Part by part, as two small neurons that changed places are lost among all weights.
        least = max(result.limit, FRAMES)
        if all(part.before <= max(ROUNDINGS * (part.rounding or 0.0), least) for part in everything.values()):
            # A search turns what is zero in both, too.
            result.verdict, result.transformation = "same", GaugeTransformation.identity(b.config)
    result.turned = describe(result.transformation)


def search_between(
    a: OpenedModel, b: OpenedModel, device: torch.device | str | None = None, progress: bool = False
) -> Found:
    """The transformation that brings A nearest to B, two models of one configuration, in the finer precision."""
    finer = torch.promote_types(torch.promote_types(a.stored_dtype, b.stored_dtype), torch.float32)
    return search_layers(a, b, finer, max_sweeps=SWEEPS, device=device, progress=progress)


def describe(transformation: GaugeTransformation) -> dict[str, str]:
    """In words, how many copies of each kind of frame a transformation moves."""
    moved: dict[str, list[float]] = {}
    for key, frame, element in transformation.items():
        difference = (element - frame.group.identity(frame.copies)).double().flatten(1)
        scale = frame.group.identity(1).double().norm().clamp_min(1.0)
        sizes = difference.norm(dim=1) / scale
        if frame.group.exchanges:
            # Two of many that changed places are little beside all indices.
            sizes = torch.maximum(sizes, (difference.abs().amax(dim=1) >= 1).double())
        moved.setdefault(key.kind, []).extend(sizes.tolist())
    words = {}
    for kind in transformation.table.kinds:
        values = moved.get(kind, [])
        count = sum(value > 1e-2 for value in values)
        words[kind] = "as it was" if count == 0 else f"{count} of {len(values)} moved"
    return words
