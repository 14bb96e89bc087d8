"""The option sets that tests of symmetries look at, and a few things that several of them do to models."""

import pytest
import torch
from torch import nn

from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.contraction import weights_of
from tests.models import SYMMETRIES


# For searches: all groups, both tables of tokens, all translations, local frames.
SEARCHED = (
    "gated-relu2",  # planes that may stretch, both scalings of neurons
    "learned-untied-projected",  # GL everywhere, all three translations
    "squared-distance-learned-frequencies",  # a common stretch, weights of lengths, planes that change places
    "parallel-local-projected",
)
# For what is quick: each kind of frame, group and role besides.
BROAD = (
    *SEARCHED,
    "distance-learned",
    "experts-clamped",
    "experts-parallel",
    "experts-shared",
    "no-biases",
    "one-key-value-head",
    "gain-metric-learned",
    "gain-vector-squared",
    "norm-bias-squared",
    "norm-bias-vector",
    "together-vector",
    "together-metric",
    "parallel-mlp-bias",
    "qk-norm",
    "relu",
    "sinks-learned",
    "rotary-zero-frequencies",
    "squared-distance-partial",
    "untied-projected",
    "value-embeddings",
)
# For what takes seconds: all groups, and what besides them norms, experts and layers of their own have.
FEW = (*SEARCHED, "experts-shared", "norm-bias-vector", "together-metric", "value-embeddings")
# Searches need no third layer.
SHALLOW = {name: {"num_hidden_layers": 2} | options for name, options in SYMMETRIES.items()}


def cases(quick, full) -> list:
    """Values of a parameter: these always, those where tests marked `full` run."""
    return [*quick, *(pytest.param(*case, marks=pytest.mark.full) for case in full if case not in quick)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disguise(model: nn.Module, seed: int = 1, frames="all", dtype: torch.dtype | None = None) -> nn.Module:
    """The model after a random element of the group, in its own dtype or rounded to another."""
    turned = GaugeTransformation.random(model.config, generator(seed), frames)(model)
    return turned if dtype is None else turned.to(dtype)


def difference(a: nn.Module, b: nn.Module, *members: nn.Module) -> float:
    """The largest between two parameters, relative to the largest entry it has in `b` or any of the `members`."""
    others = [weights_of(model) for model in (b, *members)]
    scales = {name: max(float(weights[name].abs().max()) for weights in others) for name in others[0]}
    ours = weights_of(a)
    assert len(ours) >= 12 and ours.keys() == others[0].keys()
    return max(float((w - others[0][name]).abs().max()) / max(scales[name], 1e-300) for name, w in ours.items())
