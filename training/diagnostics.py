"""Measurements of a model while it trains: kurtosis of the stream, invariance, and how busy the machine is."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from rigpt_hf.optim import full_tensor
from rigpt_hf.symmetry import haar


# Long enough to outlast the start of a clock, short enough not to be noticed.
PEAK_PRODUCTS, PEAK_SECONDS = 3, 0.3
# Large enough to keep all of a machine busy.
PEAK_SIZES = {"cpu": 1024, "cuda": 8192}


def in_parts(batch: dict[str, torch.Tensor], rows: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """A batch in parts of so many rows, of which the last may have fewer; as a whole if `rows` is `None`."""
    size = len(next(iter(batch.values())))
    for start in range(0, size, rows or size):
        yield {key: value[start : start + (rows or size)] for key, value in batch.items()}


@torch.no_grad()
def stream_kurtosis(model: nn.Module, batch: dict[str, torch.Tensor], rows: int | None = None) -> list[float]:
    """
    Excess kurtosis over the coordinates of the stream, the mean over tokens; one number per layer, the first of the
    embeddings, the last of the last layer (after the norm, as the library gives it).

    Zero for a Gaussian; large where few coordinates carry much, as models with a preferred basis have it.

    Args:
        model, batch: What is measured, and on what.
        rows (`int`, *optional*): Windows that go through the model at once; all of them if not given.
    """
    sums, tokens = torch.zeros(()), 0
    for part in in_parts(batch, rows):
        # One layer at a time: all of them in float64 would take twice the memory of the pass itself.
        values = [excess_kurtosis(state.double()) for state in _states(model, part)]
        sums = sums + torch.stack([value.sum() for value in values]).cpu()
        tokens += values[0].numel()
    return (sums / tokens).tolist()


@torch.no_grad()
def summed_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """`[2]`, float64: the loss summed over all tokens to predict, and their number; the model is in training after."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = model(**batch, use_cache=False, num_items_in_batch=torch.ones_like(count)).loss
        totals += torch.stack([loss.double().cpu(), count.double().cpu()])
    model.train()
    return totals


@torch.no_grad()
def kurtosis_in_random_frames(
    model: nn.Module, batch: dict[str, torch.Tensor], frames: int = 16, seed: int = 0
) -> dict[str, list[float]]:
    """
    [`stream_kurtosis`] after Haar rotations of the stream, per layer.

    The mean over all rotations is `-6 / (d + 1)` for every vector, whose own mean is subtracted. So in a model without
    a preferred basis, whose frame is as good as any other, kurtosis is a draw from this law; the deviation is large
    where few directions carry much, and any draw may be taken: turning the model so changes nothing else.

    Args:
        model, batch: As for [`stream_kurtosis`].
        frames (`int`): Rotations to draw, each for all layers.
        seed (`int`): Of the draw.

    Returns:
        `dict`: `mean` and `deviation` over the rotations, and `calmest`, the rotation whose largest value is least.
    """
    generator = torch.Generator().manual_seed(seed)
    states = _states(model, batch)
    rotations = [haar(states[0].shape[-1], generator).to(states[0].device, torch.float64) for _ in range(frames)]
    values = torch.tensor(
        [[excess_kurtosis(state.double() @ turn.T).mean() for state in states] for turn in rotations]
    )
    calmest = values[values.abs().amax(dim=1).argmin()]
    return {"mean": values.mean(0).tolist(), "deviation": values.std(0).tolist(), "calmest": calmest.tolist()}


@torch.no_grad()
def _states(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    was_training = model.training
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    states = model.eval()(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    model.train(was_training)
    return list(states)


def excess_kurtosis(values: torch.Tensor) -> torch.Tensor:
    """Along the last axis: the fourth central moment over the squared variance, less 3."""
    centred = values - values.mean(-1, keepdim=True)
    return centred.pow(4).mean(-1) / centred.square().mean(-1).square() - 3


@torch.no_grad()
def update_norm(model: nn.Module, before: list[torch.Tensor]) -> float:
    """How far a step has moved all weights together, relative to their norm before it."""
    moved, size = 0.0, 0.0
    for parameter, earlier in zip(model.parameters(), before, strict=True):
        moved += float(full_tensor((parameter.detach() - earlier).double().square().sum()))
        size += float(full_tensor(earlier.double().square().sum()))
    return (moved / max(size, 1e-300)) ** 0.5


@torch.no_grad()
def invariance_error(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 0) -> float:
    """How much the logits change, relative to the largest, under a random element of the whole gauge group."""
    from rigpt_hf.symmetry import GaugeTransformation, gauge_error

    generator = torch.Generator().manual_seed(seed)
    g = GaugeTransformation.random(model.config, generator, "all", compact=True)
    return gauge_error(model, g, batch["input_ids"][:1])


def flops_per_token(model: nn.Module, context: int) -> float:
    """
    Floating-point operations of a training step per token: 6 per weight of a matrix product, and `12 L H h S` for
    scores and mixing (Chowdhery et al., arXiv 2204.02311, appendix B), causal masking not counted off.
    """
    config: Any = model.config
    tables = {id(model.get_input_embeddings().weight)} if not config.tie_word_embeddings else set()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 6 * weights + 12 * config.num_hidden_layers * width * context


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """
    Operations per second of large matrix products, measured here and now; utilisation is relative to them.

    That of the fastest product: the first one also loads and compiles kernels, and others may wait for the machine.
    """
    # No random numbers: those of the run must not depend on how often it was started.
    size = PEAK_SIZES.get(device.type, PEAK_SIZES["cpu"])
    a = torch.full((size, size), 1e-3, device=device, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < PEAK_PRODUCTS or sum(seconds) < PEAK_SECONDS:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
