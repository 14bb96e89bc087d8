"""Frames to look at a model from: as it is, drawn at random, Hadamard, or along its principal axes."""

import math
from typing import Any

import numpy as np
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.quantization.hadamard import known_hadamard, sylvester
from rigpt_hf.symmetry import GaugeTransformation, haar, table_of, to_global_frame


FRAMES = ("identity", "haar", "hadamard", "pca")
# Spaces of vectors, which rotations may turn; the others are exchanged only.
SPACES = ("stream", "entry", "lexical", "output", "head_vo")


def hadamard(n: int) -> torch.Tensor:
    """
    An orthogonal `[n, n]` matrix whose entries are as alike in size as can be had, float64.

    [`known_hadamard`] where there is one; else the Kronecker product of Sylvester's matrix for the power of two with
    the orthogonal discrete cosine transform, whose entries are at most `√2` times as large.

    Raises:
        ValueError: if `n` is not positive.
    """
    known = known_hadamard(n)
    if known is not None:
        return known
    twos = n & -n
    return torch.from_numpy(np.kron(sylvester(twos).numpy() / math.sqrt(twos), cosine_transform(n // twos)))


def cosine_transform(n: int) -> np.ndarray:
    """The orthogonal discrete cosine transform `[n, n]` (DCT-II)."""
    rows = np.sqrt(2 / n) * np.cos(np.pi * np.arange(n)[:, None] * (2 * np.arange(n)[None, :] + 1) / (2 * n))
    rows[0] /= math.sqrt(2)
    return rows


@torch.no_grad()
def principal_axes(model: RiGPTForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """`[d, d]`, float64: the rotation to the principal axes of the normalised stream, over all layers."""
    states = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    moments = torch.zeros(states[0].shape[-1], states[0].shape[-1], dtype=torch.float64)
    for state in states:
        x = state.flatten(0, -2).double().cpu()
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        moments += x.T @ x
    return torch.linalg.eigh(moments).eigenvectors.T


@torch.no_grad()
def in_frame(
    model: RiGPTForCausalLM, frame: str, *, generator: torch.Generator | None = None, input_ids: Any = None
) -> RiGPTForCausalLM:
    """
    The same function from another frame.

    Args:
        model: A RiGPT, which is left as it is.
        frame (`str`):
            `"identity"`; `"haar"`: the stream, lexical spaces and the value space of every head turned at random;
            `"hadamard"`: turned by [`hadamard`] after random signs, as QuaRot does (Ashkboos et al., arXiv
            2404.00456); `"pca"`: the stream along its principal axes, all else as it is.
        generator (`torch.Generator`, *optional*): Of the draws.
        input_ids (`torch.Tensor` of shape `[batch, seq]`, *optional*): What principal axes are measured on.

    Raises:
        ValueError: if `frame` is unknown, or principal axes are wanted without anything to measure them on.
    """
    if frame not in FRAMES:
        raise ValueError(f"`frames` must be among {', '.join(FRAMES)}, got {frame!r}.")
    if frame == "identity":
        return model
    model = to_global_frame(model) if model.config.local_frames else model
    config = model.config
    if frame == "pca":
        if input_ids is None:
            raise ValueError("`input_ids` must be given to find principal axes, got None.")
        return GaugeTransformation(config, {"stream": principal_axes(model, input_ids)[None]})(model)
    elements = {}
    for key, space in table_of(config).frames.items():
        if key.kind not in SPACES:
            continue
        turns = [haar(space.group.shape(space.copies)[-1], generator) for _ in range(space.copies)]
        if frame == "hadamard":
            # Signs of a random matrix's diagonal are as good as coins, and of the generator that was given.
            turns = [hadamard(len(turn)) * turn.diagonal().sign() for turn in turns]
        elements[key] = torch.stack(turns)
    return GaugeTransformation(config, elements)(model)
