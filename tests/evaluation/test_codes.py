"""Measures of models of codes: taken of what they compute, or not applicable, which is no failure."""

import pytest
import torch

from rigpt_hf.evaluation.measure import NotApplicable
from rigpt_hf.evaluation.measures import outliers, quantization_robustness
from rigpt_hf.evaluation.measures.invariance import invariance
from rigpt_hf.evaluation.measures.perplexity import perplexity
from rigpt_hf.evaluation.models import EvaluatedModel
from tests.codes import quantized
from tests.models import tokens
from tests.tolerances import SYMMETRY


def test_what_says_nothing_of_codes_is_not_applicable():
    model = quantized("tied", torch.bfloat16)
    for measure in (outliers, quantization_robustness):
        with pytest.raises(
            NotApplicable, match="its weights are codes of 4 bits in groups of 32, tables of 8 bits alr"
        ):
            measure.needs(EvaluatedModel(model), None, None)
    rows = tokens(3, 20).tolist()
    assert 0 < invariance(model, rows, draws=1)["largest"]["float64"] <= SYMMETRY[torch.float64]
    codes, weights = (perplexity(one, rows)["loss"] for one in (model, model.dequantize(torch.bfloat16)))
    assert codes == pytest.approx(weights, rel=0.01)
