"""
Gains behind the normalisation of queries and keys: as they are, or as metrics, which prefer no basis, and back.

With a gain `g` behind it, `g n(q) = q' / sqrt(|L q'|²/h + eps)` for `q' = g q` and `L = diag(1/g)`, exactly, `eps`
included: the rows of the map take the gain over, and the norm gets a map that turns along with its head.
"""

from collections.abc import Iterable

import torch
from transformers.utils import logging

from ..configuration_rigpt import RiGPTConfig
from ..frames import layer_of


logger = logging.get_logger(__name__)
# Gains of a norm must be within this factor of the largest to become a metric. In float32 that costs nothing; 10 times
# as much costs 1e-5 of the logits once heads are turned.
LARGEST_SPREAD = 1000.0
FORMS = ("vector", "metric")


def with_form(config: RiGPTConfig, form: str, gains: Iterable[tuple[str, torch.Tensor]]) -> RiGPTConfig:
    """
    The configuration of a result whose gains have the form asked for, or, with a warning, are vectors if they cannot.

    Args:
        config (`RiGPTConfig`): of the result, as the source has it.
        form (`str`): "vector" or "metric".
        gains (`Iterable[tuple[str, torch.Tensor]]`): the source's, each `[h]` or `[heads·h]`, with their names; read
            if they decide.

    Raises:
        ValueError: if the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"`qk_gain` must be one of {', '.join(FORMS)}, got {form!r}.")
    if config.qk_norm_gain is None or form == "vector":
        return config
    for name, gain in gains:
        sizes = gain.abs().double()
        if sizes.min() * LARGEST_SPREAD < sizes.max() or not sizes.max():
            logger.warning(
                f"`qk_gain='metric'`: gains stay vectors, as those of {name!r} reach from {float(sizes.min()):.3g} to "
                f"{float(sizes.max()):.3g}, and a metric must divide by them: none may be 0, or less than a "
                f"{LARGEST_SPREAD:g}th of the largest."
            )
            return config
    logger.warning("`qk_gain='metric'`: gains of queries and keys became metrics, which prefer no basis of a head.")
    return RiGPTConfig(**(config.to_dict() | {"qk_norm_gain": form}))


def metric_maps(gain: torch.Tensor, rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`L = diag(1/g)` for every head of `size` dimensions, `[rows, h]`, of gains of one head or of all."""
    maps = torch.diag_embed(1 / gain.double().unflatten(0, (-1, size)))
    return maps.repeat(rows // len(gain), 1, 1).flatten(0, 1).to(dtype)


def rows_of_heads(gain: torch.Tensor, rows: int) -> torch.Tensor:
    """The factors of the rows of all heads, `[rows]`, in float64."""
    return gain.double().repeat(rows // len(gain))


def as_vectors(state: dict[str, torch.Tensor], tolerance: float, together: bool = False) -> dict[str, torch.Tensor]:
    """
    The weights of a RiGPT with metrics as those of one with gains.

    Args:
        state (`dict[str, torch.Tensor]`): by name.
        tolerance (`float`): how far from diagonal, and from those of other heads, metrics may be, relative.
        together (`bool`, defaults to `False`): every head has gains of its own.

    Raises:
        ValueError: if a metric is no gain in the frame that its head is in, or those of a layer are not the same.
    """
    result = dict(state)
    for name, maps in state.items():
        if not name.endswith(("q_norm.weight", "k_norm.weight")):
            continue
        maps = maps.double().unflatten(0, (-1, maps.shape[1]))
        metrics = maps.mT @ maps
        squares = metrics.diagonal(dim1=1, dim2=2)[slice(None) if together else slice(1)]
        roots = squares.sqrt()
        off = (metrics - torch.diag_embed(squares)) / (roots[:, :, None] * roots[:, None, :])
        if not bool(off.abs().max() <= tolerance):
            layer, of = layer_of(name), "queries" if "q_norm" in name else "keys"
            raise ValueError(
                f"`qk_norm_gain='metric'` has no counterpart in stock models where a metric is no gain: those of {of} "
                f"in layer {layer} are {float(off.abs().max()):.1e} away from one that is diagonal"
                f"{'' if together else ' and the same in all heads'}. Export the model before its heads are turned or "
                "trained, or keep it as RiGPT."
            )
        roots = roots.flatten()
        result[name] = 1 / roots
        for kind in ("weight", "bias"):
            rows = name.replace("_norm.weight", f"_proj.{kind}")
            if rows in state:
                factors = rows_of_heads(roots, len(state[rows]))
                result[rows] = state[rows].double() * factors.reshape(-1, *[1] * (state[rows].dim() - 1))
    return result
