"""
A canonical member of every orbit: each frame is fixed to one that the function alone determines.

In this order, each step on the result of the one before: translations to zero and stretches balanced (`balance.py`);
the stream to the eigenbasis of its Gram matrix; spaces of tokens and heads to those of theirs, planes of rotary
positions to their principal axis; signs by an odd moment; heads and neurons sorted by norm.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.utils import logging

from ..frames import FrameKey, Table, table_of
from .action import GaugeTransformation
from .balance import balance
from .contraction import ENTRY, View, Weights, decomposable, views, weights_of
from .local_frames import along, without_transports


logger = logging.get_logger(__name__)


@dataclass
class CanonicalGauge:
    """
    How a model becomes canonical, and how well determined that is.

    Args:
        transformation (`GaugeTransformation`): from the model to its canonical form.
        gaps (`dict[str, float]`):
            For each kind of frame the smallest relative distance between two eigenvalues or sorting keys, or the
            smallest odd moment. Noise in the weights moves the canonical form by about noise / gap.
        undetermined (`list[str]`):
            What the spectra and moments above do not determine, in words. There the vectors themselves decide (those
            of tokens, keys, values, in order), or a third moment for heads and neurons of equal norm; where these
            coincide too the form is not canonical, unless the weights in question are equal or zero.
    """

    transformation: GaugeTransformation
    gaps: dict[str, float] = field(default_factory=dict)
    undetermined: list[str] = field(default_factory=list)

    def note(self, kind: str, gap: float, threshold: float, text: str) -> None:
        """Keep the smallest gap of a kind, and say so where it is below the threshold."""
        self.gaps[kind] = min(gap, self.gaps.get(kind, float("inf")))
        if gap < threshold:
            self.undetermined.append(text)


def canonicalize(model: nn.Module) -> nn.Module:
    """
    The canonical member of a model's orbit, as a new model of the same dtype.

    All models of one orbit give the same weights (to about 1e-12 in float64 for weights of order one), whatever
    rotation, stretch, translation or permutation in any frame lies between them. What a degenerate spectrum leaves
    open is logged; [`canonical_gauge`] returns it, with the transformation.

    Args:
        model: A RiGPT; it stays as it is.
    """
    gauge = canonical_gauge(model)
    for text in gauge.undetermined:
        logger.warning(f"The canonical form is not determined everywhere: {text}.")
    return gauge.transformation(model)


@torch.no_grad()
@decomposable()
def canonical_gauge(model: nn.Module) -> CanonicalGauge:
    """The transformation to the canonical member of a model's orbit, and how well it is determined."""
    config, table = model.config, table_of(model.config)
    total, weights = balance(config, weights_of(model))
    gauge = CanonicalGauge(total)
    for method, keys in _steps(table):
        elements: dict[FrameKey, torch.Tensor] = {}
        for view in [_stream(table, weights)] if keys == table.streams else views(table, weights, weights, keys):
            element = getattr(view.group, method)(view, gauge.note)
            elements |= along(table, element) if keys == table.streams else {view.key: element}
        step = GaugeTransformation(config, elements)
        gauge.transformation, weights = step @ gauge.transformation, step.state_dict(weights)
    return gauge


def _steps(table: Table) -> Iterator[tuple[str, tuple[FrameKey, ...]]]:
    """Methods of groups and the frames they are called for; each step stands on those before."""
    groups = {key: table.frames[key].group for key in table.frames if key not in table.shifts}
    yield "arrange", tuple(key for key, group in groups.items() if group.movable)
    # The stream where it begins, and then by what comes from there.
    yield "orient", tuple(key for key in groups if key == ENTRY)
    yield "orient", table.streams
    single = [key for key, group in groups.items() if not group.exchanges and key not in (*table.streams, ENTRY)]
    for later in (False, True):
        yield "orient", tuple(key for key in single if (table.frames[key].after is not None) is later)
    exchanges = [key for key, group in groups.items() if group.exchanges]
    for carried in (True, False):
        yield "orient", tuple(key for key in exchanges if (table.frames[key].carrier is not None) is carried)


@torch.no_grad()
def invariants(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Spectra that no gauge transformation changes, in descending order, float64.

    - `stream` `[d]`: eigenvalues of the stream's Gram matrix (of everything read from and written to it);
    - `lexical`, `output` `[D]`: singular values of the product of embedding and projections;
    - `layers.{i}.head_vo`, `layers.{i}.head_qk`: singular values of the maps that the heads of a layer apply, resp.
      score with, all heads together (eigenvalues of the Gram matrix where lengths matter, one value per plane where
      positions are rotary);
    - `layers.{i}.neurons`: least norm of each neuron; `layers.{i}.heads` of each query head.
    """
    table = table_of(model.config)
    _, weights = balance(model.config, weights_of(model))
    result = {"stream": torch.linalg.eigvalsh(_stream(table, weights).total()[0]).flip(0)}
    for view in views(table, weights, weights, [key for key in table.frames if key not in table.streams]):
        result[str(view.key)] = view.group.spectrum(view.grams).sort(descending=True).values
    return result


def _stream(table: Table, weights: Weights) -> View:
    """Everything that is read from and written to the residual stream."""
    weights = without_transports(weights)
    return View(table, table.streams, weights, weights)
