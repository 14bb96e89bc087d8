"""Which option sets the tests of symmetries look at; the others run where tests marked `full` do."""

import pytest

from tests.models import SYMMETRIES


# For searches: all groups, both tables of tokens, all translations, local frames.
SEARCHED = (
    "gated-relu2",  # planes that may stretch, both scalings of neurons
    "learned-untied-projected",  # GL everywhere, all three translations
    "squared-distance-learned-frequencies",  # a common stretch, weights of lengths, planes that change places
    "local-frames-projected",
)
# For what is quick: each kind of frame, group and role besides.
BROAD = (
    *SEARCHED,
    "distance-learned",
    "no-biases",
    "one-key-value-head",
    "qk-norm",
    "relu",
    "rotary-zero-frequencies",
    "squared-distance-partial",
    "untied-projected",
    "value-embeddings",
)
SHALLOW = {name: {"num_hidden_layers": 2} | options for name, options in SYMMETRIES.items()}


def shallow(*full: str) -> pytest.MarkDecorator:
    """A test for the `options` of two layers of each searched set; of these others where tests marked `full` run."""
    rest = [pytest.param(SHALLOW[name], marks=pytest.mark.full, id=name) for name in full if name not in SEARCHED]
    return pytest.mark.parametrize("options", [*(pytest.param(SHALLOW[name], id=name) for name in SEARCHED), *rest])
