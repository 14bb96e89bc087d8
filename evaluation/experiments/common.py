"""What the experiments share: a training step, and numbers written down."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rigpt_hf.checkpoints.folder import write_text


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


def write_json(path: Path, value: Any) -> None:
    """Numbers in a file that appears complete; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")
