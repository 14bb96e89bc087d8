"""How far a model is from having no preferred basis: what a random turn of its inner spaces changes."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rigpt_hf import RiGPTConfig
from rigpt_hf.symmetry import GaugeTransformation, gauge_error, haar, table_of

from .subjects import Texts, subject


# Rows and tokens of each that are looked at.
ROWS, CONTEXT = 4, 128
# A stock model has no other frame of which one knows how it would turn.
STREAM = "stream"


@torch.no_grad()
def invariance(
    model: Any,
    texts: Texts,
    tokenizer: Any = None,
    *,
    frame: Sequence[str] | str = "all",
    dtypes: Sequence[str] = ("float64", "float32"),
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
        model, tokenizer: As for [`subject`].
        texts: Texts or rows of token ids; the first four that are long enough are read.
        frame (`str` or `list[str]`, defaults to `"all"`): Frames to turn, one at a time, by the names of the table of
            frames; for stock models there is only `"stream"`.
        dtypes (`list[str]`): Of weights and arithmetic.
        draws (`int`, defaults to 3): Random transformations per frame and dtype.
        seed (`int`, defaults to 0): Of the draws.
        context (`int`, defaults to 128): Tokens of each text that are read.

    Returns:
        `dict`: `errors`: per frame, per dtype, `mean` and `largest` over the draws; `largest` per dtype over all
        frames; NaN where a logit is no number or infinite; `protocol`.

    Raises:
        ValueError: if an argument is impossible, or the model is of a family whose spaces nobody knows how to turn.
    """
    measured = subject(model, tokenizer)
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
    errors: dict[str, dict[str, dict[str, float]]] = {name: {} for name in wanted}
    for label, dtype in precisions.items():
        copied = _copy(measured.model, dtype)
        for name in wanted:
            generator = torch.Generator().manual_seed(seed)
            values = [_error(copied, name, generator, ids.to(measured.device)) for _ in range(draws)]
            errors[name][label] = {"mean": statistics.mean(values), "largest": largest(values)}
    return {
        "errors": errors,
        "largest": {label: largest(errors[name][label]["largest"] for name in wanted) for label in precisions},
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


def _copy(model: Any, dtype: torch.dtype) -> Any:
    import copy

    return copy.deepcopy(model).to(dtype).eval()


def _error(model: Any, frame: str, generator: torch.Generator, ids: torch.Tensor) -> float:
    config = model.config
    if isinstance(config, RiGPTConfig):
        return gauge_error(model, GaugeTransformation.random(config, generator, frame, compact=True), ids)
    from rigpt_hf.conversion.stock_rotation import rotate_stock

    turned = rotate_stock(model, haar(config.hidden_size, generator))
    before, after = (each(input_ids=ids, use_cache=False).logits for each in (model, turned))
    return float((after - before).abs().max() / before.abs().max())


def first_rows(rows: list[list[int]], context: int, count: int = ROWS) -> torch.Tensor:
    """
    Token ids `[at most count, at most context]`: rows that are long enough, or the longest if none is.

    Raises:
        ValueError: if no row has two tokens.
    """
    length = min(context, max(map(len, rows)))
    if length < 2:
        raise ValueError(f"`predictions` must hold a text of at least two tokens, got {length}.")
    return torch.tensor([row[:length] for row in rows if len(row) >= length][:count])
