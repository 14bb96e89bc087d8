"""
A learned rotation of the stream, beside the Hadamard one: is there a frame in which rounding costs less?

What a group of weights loses to rounding goes with the square of the largest among them, times the mean squares of the
inputs, whose sum no rotation changes. The rotation is learned by Adam, by Cayley's map, so that the sum over all
matrices gets less, each with its weighted moments; the largest is made smooth as a norm of high power.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from tqdm.auto import tqdm

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.frames import layer_of, table_of
from rigpt_hf.quantization.frames import hadamard_stream
from rigpt_hf.symmetry import GaugeTransformation


POWER, LEARNING_RATE = 8, 1e-3
# Matrices that are looked at in one step.
AT_ONCE = 28


class Peaks:
    """
    The sum over matrices of `|x|²` of the inputs times the squared peaks of groups, relative to where it begins.

    Args:
        model (`RiGPTForCausalLM`): in the frame in which the rotation is the identity.
        strengths (`Mapping[str, float]`): traces of moments by the names of modules.
        group (`int`, *optional*): Neighbours in a row that share a scale; whole rows if not given.
    """

    def __init__(self, model: RiGPTForCausalLM, strengths: Mapping[str, float], group: int | None = None):
        table = table_of(model.config)
        self.group, self.matrices = group, []
        for name, strength in strengths.items():
            if layer_of(f"{name}.weight") is not None:
                role = table.role_on(f"{name}.weight", "stream")
                weight = model.get_submodule(name).weight.detach().float()
                if role in ("reads", "writes"):
                    self.matrices.append((weight, role == "writes", strength))

    def __call__(self, rotation: torch.Tensor, chosen: list[int] | None = None) -> torch.Tensor:
        """The mean over the chosen matrices, or all."""
        taken = [self.matrices[index] for index in (range(len(self.matrices)) if chosen is None else chosen)]
        total = torch.zeros(())
        for weight, writes, strength in taken:
            turned = rotation @ weight if writes else weight @ rotation.T
            parts = turned.unflatten(1, (-1, self.group or turned.shape[1]))
            total = total + strength * parts.pow(POWER).sum(-1).pow(2 / POWER).sum()
        return total / len(taken)


def learned_frame(
    model: RiGPTForCausalLM,
    moments: Mapping[str, torch.Tensor],
    group: int | None,
    steps: int,
    *,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    progress: bool = False,
) -> tuple[GaugeTransformation, float]:
    """
    The frame of the stream that is learned from the Hadamard one, and what is left of the sum of peaks (1: nothing
    was gained).

    Raises:
        ValueError: if the width has no Hadamard matrix, or the model more than one frame of the stream.
    """
    generator = torch.Generator().manual_seed(seed)
    elements = hadamard_stream(model.config, generator)
    if len(elements) != 1:
        raise ValueError(f"`model` must have one frame of the stream, got {len(elements)}. Take one without others.")
    ((key, start),) = elements.items()
    peaks = Peaks(
        GaugeTransformation(model.config, elements)(model),
        {name: float(seen.diagonal(dim1=-2, dim2=-1).sum()) for name, seen in moments.items()},
        group,
    )
    turn = nn.Linear(*start.shape[1:], bias=False)
    with torch.no_grad():
        turn.weight.copy_(torch.eye(start.shape[-1]))
    orthogonal(turn, orthogonal_map="cayley")
    optimizer = torch.optim.Adam(turn.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, max(1, steps))
    with torch.no_grad():
        before = float(peaks(turn.weight))
    for _ in tqdm(range(steps), desc="Learning the rotation", unit="step", disable=not progress):
        chosen = torch.randperm(len(peaks.matrices), generator=generator)[:AT_ONCE].tolist()
        loss = peaks(turn.weight, chosen) / before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        left = float(peaks(turn.weight)) / before
        # Polished in float64, so that what is turned back is what was there.
        left_vectors, _, right_vectors = torch.linalg.svd(turn.weight.double())
    rotation = (left_vectors @ right_vectors) @ start[0].double()
    return GaugeTransformation(model.config, {key: rotation[None]}), left
