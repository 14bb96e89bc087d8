"""The search on a device: on a stand-in for a GPU, and on one where there is one."""

import pytest
import torch

from rigpt_hf.symmetry import compare
from rigpt_hf.symmetry.given import given
from rigpt_hf.symmetry.layered import Found, search_layers
from tests.devices import DEVICE, OnDevice, StandIn
from tests.models import noisy, over, tiny_model
from tests.symmetry.options import BROAD, SEARCHED, SHALLOW, disguise
from tests.tolerances import DISTANCE


PRODUCTS = {"matmul", "addmm_", "mul", "sum", "vector_norm"}
DECOMPOSITIONS = {"svd", "eigh", "inv", "pinv", "svdvals", "slogdet"}
# Where a block comes to the device, and every other place that moves tensors, with options that lead there.
BLOCKS = "Balanced.raw"
MOVES = {
    "View.grams": "gated",
    "_without_translations": "learned",
    "Search.turn_of": "gated",
    "HeadPermutations._cross": "multi-head",
    "NeuronGroup.likeness": "gated",
    "ExpertPermutations.nearest": "experts",
    "GainScalings.nearest": "norm-bias-vector",
    "GaugeTransformation._translate": "learned",
    "MatrixGroup.act": "gated",
    "HeadPermutations.act": "multi-head",
    "NeuronGroup.act": "gated",
    "GainScalings.act": "norm-bias-vector",
    "HalfTurns.act": "norm-bias-vector",
}


def searched(option: str, dtype: torch.dtype = torch.float64, **where) -> Found:
    """A short search between two relatives."""
    a = tiny_model(**SHALLOW[option]).to(dtype)
    b = disguise(noisy(a, 0.05))
    return search_layers(given(a), given(b), dtype, max_sweeps=2, **where)


def elements_of(found: Found) -> dict[str, torch.Tensor]:
    elements = found.transformation.elements
    assert len(elements) > 4 and not any(isinstance(element, OnDevice) for element in elements.values())
    return elements


@over([*SEARCHED, "gated", "multi-head", "learned", "experts-shared", "norm-bias-vector"], BROAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.by_default(10)
def test_the_search_is_the_same_on_a_device(option, dtype):
    expected = searched(option, dtype)
    with StandIn() as device:
        found = searched(option, dtype, device=DEVICE)
        assert isinstance(next(iter(found.aligned(0).values())), OnDevice)
    ours, theirs = elements_of(found), elements_of(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert found.distances == expected.distances and found.parts == expected.parts
    assert all(device.seen[name] >= 8 for name in PRODUCTS), "the work was done elsewhere"
    assert not DECOMPOSITIONS & device.seen.keys()
    assert all(place.startswith((BLOCKS, *MOVES)) for place in device.moved)


@pytest.mark.parametrize(("place", "option"), MOVES.items(), ids=MOVES)
def test_a_missing_move_shows(place, option):
    with StandIn(place) as device, pytest.raises((RuntimeError, TypeError, AssertionError)):
        elements_of(searched(option, device=DEVICE))
    assert any(caller.startswith(place) for caller in device.moved), "nothing was missing"


@pytest.mark.parametrize("option", ["gated", "learned"])
@pytest.mark.by_default(1)
def test_a_comparison_takes_the_gpu_where_there_is_one(option, monkeypatch):
    model = tiny_model(**SHALLOW[option])
    rounded = disguise(model, dtype=torch.bfloat16)
    with StandIn() as device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        expected = compare(model, rounded)
        assert not device.seen, "there is none"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert compare(model, rounded, device="cpu").to_dict() == expected.to_dict()
        assert not device.seen, "it was not asked for"
        found = compare(model, rounded)
    assert all(device.seen[name] >= 8 for name in PRODUCTS)
    assert found.to_dict() == expected.to_dict()
    assert found.verdict == "disguise" and found.total.rounding > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA on this machine")
@pytest.mark.parametrize("option", ["gated", "learned"])
def test_a_gpu(option):
    model = tiny_model(**SHALLOW[option])
    for dtype in (torch.float64, torch.float32):
        found = compare(model.to(dtype), disguise(model.to(dtype)), device="cuda")
        assert found.verdict == "disguise" and found.total.distance <= DISTANCE[dtype]
