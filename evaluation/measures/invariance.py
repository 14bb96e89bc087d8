"""
How far a model is from having no preferred basis: what a random turn of its inner spaces changes.

Dimensionless; rounding where there is no preferred basis (symmetries: Hashimoto et al., arXiv 2402.02362).
"""

import copy
import math
import statistics
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import torch
from tqdm.auto import tqdm

from rigpt_hf import RiGPTConfig
from rigpt_hf.checkpoints.dequantized import of_weights
from rigpt_hf.conversion.families import architecture_of
from rigpt_hf.symmetry import GaugeTransformation, gauge_error, haar, table_of

from ..drawing import MARKERS, WIDTH, aside, number, readable
from ..likelihood import first_rows
from ..measure import Inputs, Measure, Names, NotApplicable, Quantity, rows_of_task
from ..models import EvaluatedModel, Texts, evaluated
from ..numbers import number as shown


# Tokens of each row that are looked at.
CONTEXT = 128
# A stock model has no other frame of which one knows how it would turn.
STREAM = "stream"


@torch.no_grad()
def invariance(
    model: Any,
    texts: Texts,
    tokenizer: Any = None,
    *,
    frame: Names | str = "all",
    dtypes: Names = ("float64", "float32"),
    draws: int = 3,
    seed: int = 0,
    context: int = CONTEXT,
) -> dict[str, Any]:
    """
    The gauge error `max |Δlogit| / max |logit|` of random transformations, per frame and dtype.

    Only transformations that keep all lengths are drawn: rotations and reflections (Haar), exchanges, signs. For a
    stock model of a family that can be converted, the stream is turned in the same way, which its norms' gains and
    biases cannot follow, so that its error is of order one.

    Args:
        model, tokenizer: As for [`evaluated`].
        texts: Texts or rows of token ids; the first four that are long enough are read.
        frame (`str` or `list[str]`, defaults to `"all"`): Frames to turn, one at a time, by the names of the table of
            frames; for stock models there is only `"stream"`.
        dtypes (`list[str]`): Of weights and arithmetic.
        draws (`int`, defaults to 3): Random transformations per frame and dtype.
        seed (`int`, defaults to 0): Of the draws.
        context (`int`, defaults to 128): Tokens of each text that are read.

    Returns:
        `dict`: `errors`: per frame, per dtype, `mean` and `largest` over the draws; `largest` per dtype over all
        frames; NaN where a logit is no number or infinite; `protocol`. Frames that nothing of the kind moves, such as
        translations, are left out.

    Raises:
        ValueError: if an argument is impossible, or the model is of a family whose spaces nobody knows how to turn.
    """
    measured = evaluated(model, tokenizer)
    if draws < 1:
        raise ValueError(f"`draws` must be at least 1, got {draws}.")
    if context < 2:
        raise ValueError(f"`context` must be at least 2, got {context}.")
    if not dtypes:
        raise ValueError("`dtypes` must name at least one dtype, such as 'float64', got none.")
    precisions = {name: _dtype(name) for name in dtypes}
    ids = first_rows(measured.encode(texts), min(context, measured.context(None)))
    config = measured.model.config
    known = list(table_of(config).kinds) if isinstance(config, RiGPTConfig) else [STREAM]
    wanted = known if frame == "all" else [frame] if isinstance(frame, str) else list(frame)
    if not wanted:
        raise ValueError("`frame` must name at least one frame, or 'all', got none.")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"`frame` must be among {', '.join(known)} for this model, or 'all', got {unknown[0]!r}.")
    errors: dict[str, dict[str, dict[str, float]]] = {}
    bar = tqdm(total=len(precisions) * len(wanted), desc="Turning frames", unit="frame", delay=2, disable=None)
    for label, dtype in precisions.items():
        copied = copy.deepcopy(of_weights(measured.model)).to(dtype).eval()
        for name in wanted:
            generator = torch.Generator().manual_seed(seed)
            drawn = [_error(copied, name, generator, ids.to(measured.device)) for _ in range(draws)]
            # That nothing moved when nothing was turned is no measurement.
            if values := [value for value in drawn if value is not None]:
                errors.setdefault(name, {})[label] = {"mean": statistics.mean(values), "largest": largest(values)}
            bar.update()
    bar.close()
    if not errors:
        raise ValueError(f"`frame` must name one that turns with all lengths kept, got {', '.join(wanted)}.")
    return {
        "errors": errors,
        "largest": {label: largest(each[label]["largest"] for each in errors.values()) for label in precisions},
        "protocol": {
            "draws": draws,
            "seed": seed,
            "tokens": list(ids.shape),
            "transformations": "compact",
            "stock": not isinstance(config, RiGPTConfig),
        },
    }


def largest(values: Iterable[float]) -> float:
    """The largest, NaN if one of them is: `max` would lose it."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtypes` must be names of floating-point dtypes, such as 'float64', got {name!r}.")
    return dtype


def _error(model: Any, frame: str, generator: torch.Generator, ids: torch.Tensor) -> float | None:
    """The gauge error of one draw, `None` if it moves nothing."""
    config = model.config
    if isinstance(config, RiGPTConfig):
        g = GaugeTransformation.random(config, generator, frame, compact=True)
        moves = any(not torch.equal(each, place.group.identity(place.copies)) for _, place, each in g.items())
        return gauge_error(model, g, ids) if moves else None
    from rigpt_hf.conversion.stock_rotation import rotate_stock

    turned = rotate_stock(model, haar(config.hidden_size, generator))
    before, after = (each(input_ids=ids, use_cache=False).logits for each in (model, turned))
    return float((after - before).abs().max() / before.abs().max())


def needs(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
    """A model of which it is known how its stream would turn."""
    if not isinstance(model.config, RiGPTConfig):
        try:
            architecture_of(model.config, type(model.model).__name__)
        except ValueError as error:
            raise NotApplicable(" ".join(str(error).split())) from error
    return rows_of_task(model, texts, task)


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """The largest error of each dtype."""
    return [Quantity(f"largest error, {dtype}", "relative", value) for dtype, value in result["largest"].items()]


def draw(picture: Any, task: dict[str, Any], names: dict[str, str]) -> str:
    """Gauge errors, frame by frame."""
    errors = {name: task["models"][name]["errors"] for name in names}
    frames = list(dict.fromkeys(frame for each in errors.values() for frame in each))
    picture.set_size_inches(WIDTH, 0.65 + 0.24 * len(frames))
    axes = picture.subplots()
    drawn, said = [], []
    for index, (name, colour) in enumerate(names.items()):
        dtypes = list(dict.fromkeys(dtype for each in errors[name].values() for dtype in each))
        for marker, dtype in zip(cycle(MARKERS), dtypes, strict=False):
            values = [number(each.get(dtype, {}).get("largest")) for each in errors[name].values()]
            places = [frames.index(frame) + aside(index, len(names), 0.5) for frame in errors[name]]
            label = f"{name}, {dtype}"
            axes.plot(values, places, marker, markersize=5, color=colour, label=label, fillstyle="none", clip_on=False)
            drawn += values
            listed = ", ".join(f"{frame} {shown(value)}" for frame, value in zip(errors[name], values, strict=True))
            said.append(f"{label}: {listed}.")
    positive = [each for each in drawn if each > 0]
    # Some turns change nothing at all, and zero has a place on no logarithmic axis.
    has_zero = 0 in drawn or not positive
    readable(axes.xaxis, drawn, 10.0 ** math.floor(math.log10(min(positive, default=1))) if has_zero else None)
    axes.set_yticks(range(len(frames)), frames)
    axes.set_ylim(len(frames) - 0.5, -0.5)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel="max |Δlogit| / max |logit|", ylabel="frame that is turned")
    return " ".join(said)


MEASURE = Measure(
    "invariance",
    "How far do the logits move when one of the model's inner spaces is turned at random? A model without a preferred "
    "basis gives rounding errors, any other a number of order one.",
    invariance,
    quantities,
    "what a random turn of a frame changes, the largest of all draws",
    draw,
    needs=needs,
)
