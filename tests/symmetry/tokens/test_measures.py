"""What is said of a model's symmetry is what it has."""

import copy

import pytest
import torch

from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry, learned_symmetry, symmetrize, symmetry_error
from tests.models import ALL, tiny_model, tokens
from tests.symmetry.options import generator
from tests.symmetry.tokens.groups import SYMMETRIES
from tests.tolerances import DISTANCE, SYMMETRY


@torch.no_grad()
@pytest.mark.full
def test_a_symmetry_is_found_in_any_frame():
    """A model that was made symmetric and turned is itself after relabelling, up to a gauge transformation."""
    model, symmetry = tiny_model(**ALL["learned-untied-projected"]), SYMMETRIES["cyclic"]()
    symmetric = symmetrize(model, Representation.choose(model.config, symmetry))
    turned = GaugeTransformation.random(model.config, generator(5), "all")(symmetric)
    inputs = tokens(2, 12)
    found, other = (learned_symmetry(one, symmetry, inputs) for one in (turned, model))
    assert found.function.max < SYMMETRY[torch.float64] * 100 < 0.01 < other.function.mean
    assert max(found.gauge_distances) < DISTANCE[torch.float64] < 0.1 < min(other.gauge_distances)
    assert len(found.gauge_distances) == len(symmetry.generators)


@torch.no_grad()
def test_the_error_grows_with_what_breaks_the_symmetry():
    model, symmetry = tiny_model(**ALL["learned"]), SYMMETRIES["two"]()
    representation = Representation.choose(model.config, symmetry)
    symmetric, errors, distances = symmetrize(model, representation), [], []
    for size in (0, 1e-6, 1e-4, 1e-2):
        broken = copy.deepcopy(symmetric)
        draw = generator(3)
        for parameter in broken.parameters():
            parameter += size * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        broken.train()
        error = symmetry_error(broken, symmetry, tokens(2, 12))
        assert (broken.training and error.mean < error.max) or size == 0
        errors.append(error.mean)
        distances.append(representation.distance(broken))
    assert errors == sorted(errors) and distances == sorted(distances) and distances[0] < SYMMETRY[torch.float64]
    assert distances[3] == pytest.approx(100 * distances[2], rel=0.02)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="got 70 tokens for a table of 61. Make it with the model's tokenizer"):
        symmetry_error(tiny_model(), TokenSymmetry(70, [[[1, 2]]]), tokens(1, 4))
