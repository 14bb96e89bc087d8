"""Shared by the experiments: checks of their options, a training step, a sweep, numbers written down."""

import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from rigpt_hf import __version__
from rigpt_hf.checkpoints.folder import write_text


VERSIONS = {"rigpt_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def check_least(options: Any, **bounds: float) -> None:
    """Raise a `ValueError` if one of the options named is below its bound, or no finite number; `None` may."""
    for name, bound in bounds.items():
        value = getattr(options, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"`{name}` must be at least {bound}, got {value}. Take another.")


def check_heads(options: Any) -> None:
    """Raise a `ValueError` if the stream cannot be divided among the heads."""
    check_least(options, hidden_size=1, layers=1, heads=1)
    if options.hidden_size % options.heads:
        raise ValueError(
            f"`hidden_size` must be a multiple of `heads`, got {options.hidden_size} and {options.heads}. Change one."
        )


def check_known(name: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise a `ValueError` if something given is not known, or nothing is given."""
    given = list(given)
    if not given:
        raise ValueError(f"`{name}` must name some of {', '.join(known)}, got none. Leave it out, or name one.")
    for word in given:
        if word not in known:
            raise ValueError(f"`{name}` must name some of {', '.join(known)}, got {word!r}.")


def check_rates(rates: Collection[float]) -> None:
    """Raise a `ValueError` if one of the learning rates is none."""
    if not all(0 < rate < math.inf for rate in rates):
        given = ",".join(f"{rate:g}" for rate in rates)
        raise ValueError(f"`rates` must be positive numbers, separated by commas, got {given!r}. Correct them.")


def ranked(loss: float) -> tuple[bool, float]:
    """A key to sort losses by: one that is no number, as of a run that diverged, comes after all others."""
    return not math.isfinite(loss), loss


def least(runs: Sequence[dict[str, Any]], loss: str) -> dict[str, Any]:
    """
    The run whose value under `loss` is the least, among those that did not diverge.

    Raises:
        ValueError: if all of them did.
    """
    best = min(runs, key=lambda run: ranked(run[loss]))
    if not math.isfinite(best[loss]):
        given = ", ".join(str(run[loss]) for run in runs)
        raise ValueError(
            f"`rates` must have one at which training does not diverge, got {given} as the {loss.replace('_', ' ')}. "
            "Give lower ones."
        )
    return best


def sweep(
    train: Callable[[float, int], dict[str, Any]], rates: Sequence[float], seeds: int, loss: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    The runs of all learning rates with seed 0, and those of the best rate with every seed.

    Args:
        train: One run with a rate and a seed; its result has the key `loss`, by which the best rate is chosen.
    """
    first = [train(rate, 0) for rate in rates]
    best = least(first, loss)
    rate = rates[first.index(best)]
    return first, [best, *(train(rate, seed) for seed in range(1, seeds))]


def training_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[torch.Tensor],
    *,
    max_grad_norm: float | None = None,
    mixed: bool = False,
) -> float:
    """
    Forward and backward over all batches, then one step of the optimizer.

    Args:
        model: A causal language model.
        optimizer: Of its parameters, whose gradients are those of this step only.
        batches: Rows of token ids, each `[batch, seq]`; their gradients are averaged.
        max_grad_norm (`float`, *optional*): The norm of the gradient is clipped to it.
        mixed (`bool`): Whether to compute in bfloat16 where that is enough.

    Returns:
        `float`: The mean loss, nats per token.
    """
    total = 0.0
    for ids in batches:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
            loss = model(ids, labels=ids, use_cache=False).loss
        (loss / len(batches) if len(batches) > 1 else loss).backward()
        total += float(loss.detach())
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total / len(batches)


def band(panel: Any, x: Sequence[float], curves: np.ndarray, label: str, alpha: float) -> None:
    """The mean of curves `[N, len(x)]`, and a band from the lowest to the highest."""
    (line,) = panel.plot(x, curves.mean(0), label=label)
    panel.fill_between(x, curves.min(0), curves.max(0), color=line.get_color(), alpha=alpha)


def median_and_range(values: Sequence[float], form: str) -> list[str]:
    """The median, the lowest and the highest value, as cells of a table."""
    return [form.format(pick(values)) for pick in (statistics.median, min, max)]


def write_json(
    path: Path | None, value: Any, indent: int | None = 2, seen: list[int] | None = None, *, named: bool = False
) -> None:
    """
    Write numbers, and paths as text, to a file that appears complete, if one is named; its folder is made.

    Args:
        path, value, indent: The file, what is in it, and how it is laid out.
        seen, named: As of `new_file`.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=indent, default=str) + "\n", seen=seen, named=named)
