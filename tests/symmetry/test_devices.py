"""
The search on a device. No GPU is needed: a stand-in keeps numbers on the CPU and refuses what a GPU would refuse.

Under [`StandIn`] a tensor that is moved to `DEVICE`, or made there, is marked, and so is what is computed from it. It is
no GPU: sums have the order that they have on a CPU, so results must be the same bit for bit.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from rigpt_hf.symmetry import compare
from rigpt_hf.symmetry.given import given
from rigpt_hf.symmetry.layered import Found, search_layers
from tests.models import noisy, over, tiny_model
from tests.symmetry.options import SEARCHED, SHALLOW, disguise
from tests.tolerances import DISTANCE


DEVICE, CPU = torch.device("cuda"), torch.device("cpu")
PRODUCTS = {"matmul", "mul", "sum", "linalg_vector_norm"}
DECOMPOSITIONS = {"svd", "eigh", "inv", "pinv", "svdvals", "slogdet"}
# Every place that brings tensors from one device to the other, and options by which a search comes there.
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


class OnDevice(torch.Tensor):
    """A tensor that is said to be on `DEVICE`."""


class StandIn(TorchFunctionMode):
    """
    While entered, `DEVICE` is there.

    Args:
        broken: The function in which nothing moves.

    Attributes:
        seen: How often functions have got or made tensors there.
        moved: How often functions of ours have moved a tensor.
    """

    def __init__(self, broken: str = ""):
        super().__init__()
        self.broken, self.seen, self.moved = broken, Counter[str](), Counter[str]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or func.__name__).replace("Tensor.", "").removeprefix("torch.")
        is_here = [isinstance(each, OnDevice) for each in tensors_in(args, kwargs)]
        if name == "device.__get__":
            return DEVICE if any(is_here) else CPU
        with torch._C.DisableTorchFunctionSubclass():
            device, args, kwargs = without_device(name, args, kwargs or {})
            caller = sys._getframe(1).f_code.co_qualname
            if device is not None and caller.startswith(self.broken or " "):
                device = None
            if any(is_here) and device is None:
                if any(each.dim() for each in tensors_in(args, kwargs) if not isinstance(each, OnDevice)):
                    raise RuntimeError(f"{name} got tensors on two devices")
                if name == "numpy":
                    raise TypeError("a tensor on a device has no numpy")
            to = device or (DEVICE if any(is_here) else CPU)
            result = func(*args, **kwargs)
        if is_here and to != (DEVICE if is_here[0] else CPU):
            self.moved[caller] += 1
        if any(is_here):
            self.seen[name.removeprefix("linalg.")] += 1
        kind = OnDevice if to == DEVICE else torch.Tensor
        return tree_map(lambda each: each.as_subclass(kind) if isinstance(each, torch.Tensor) else each, result)


def tensors_in(*arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def without_device(name: str, args: tuple, kwargs: dict) -> tuple:
    """The device that a call asks for, if any, and its arguments without it."""
    if name == "cpu":
        return CPU, args, kwargs
    device, kwargs = kwargs.get("device"), {key: value for key, value in kwargs.items() if key != "device"}
    if name == "to":
        rest = []
        for each in args[1:]:
            if isinstance(each, torch.Tensor):
                device = DEVICE if isinstance(each, OnDevice) else CPU
            elif isinstance(each, str | torch.device):
                device = each
            rest += [each.dtype] if isinstance(each, torch.Tensor) else [each] if isinstance(each, torch.dtype) else []
        args = (args[0], *rest)
    return device and torch.device(device), args, kwargs


def searched(option: str, dtype: torch.dtype = torch.float64, **where) -> Found:
    """A search of few sweeps between two relatives."""
    a = tiny_model(**SHALLOW[option]).to(dtype)
    b = disguise(noisy(a, 0.05))
    return search_layers(given(a), given(b), dtype, max_sweeps=3, **where)


def check_same(found: Found, expected: Found) -> None:
    elements, others = found.transformation.elements, expected.transformation.elements
    assert not any(isinstance(element, OnDevice) for element in elements.values())
    assert elements.keys() == others.keys() and len(elements) > 4
    assert all(torch.equal(element, others[key]) for key, element in elements.items())
    assert found.distances == expected.distances and found.parts == expected.parts


@over([*SEARCHED, "gated", "multi-head", "learned", "experts-shared", "norm-bias-vector"], SHALLOW)
def test_the_search_is_the_same_on_a_device(option):
    for dtype in (torch.float64, torch.float32):
        expected = searched(option, dtype)
        with StandIn() as device:
            found = searched(option, dtype, device=DEVICE)
        check_same(found, expected)
        assert all(device.seen[name] > 20 for name in PRODUCTS), "the work was done elsewhere"
        assert not DECOMPOSITIONS & device.seen.keys()
        assert isinstance(next(iter(found.aligned(0).values())), OnDevice)


@pytest.mark.parametrize(("place", "option"), MOVES.items(), ids=MOVES)
def test_a_move_that_is_missing_shows(place, option):
    """Every other test of this file passes on moves; without one of them the stand-in must raise."""
    expected = searched(option)
    with StandIn() as device:
        check_same(searched(option, device=DEVICE), expected)
    assert sum(count for caller, count in device.moved.items() if caller.startswith(place)) > 0
    with StandIn(place), pytest.raises((RuntimeError, TypeError, AssertionError)):
        check_same(searched(option, device=DEVICE), expected)


def test_no_other_place_moves_tensors():
    """Those of `MOVES`, and that in which a block comes to the device."""
    with StandIn() as device:
        for option in {*MOVES.values(), *SEARCHED}:
            searched(option, device=DEVICE)
    places = {place for place in device.moved if not place.startswith(tuple(MOVES))}
    assert {place.partition(".<")[0] for place in places} == {"Balanced.raw"}


@pytest.mark.parametrize("option", ["gated", "learned"])
def test_a_comparison_takes_the_gpu_where_there_is_one(option, monkeypatch):
    model = tiny_model(**SHALLOW[option])
    rounded = disguise(model, dtype=torch.bfloat16)
    with StandIn() as device:
        expected = compare(model, rounded)
        assert not device.seen, "there is none"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = compare(model, rounded)
        assert all(device.seen[name] > 20 for name in PRODUCTS)
        assert compare(model, rounded, device="cpu").to_dict() == expected.to_dict()
    assert found.to_dict() == expected.to_dict()
    assert found.verdict == "disguise" and found.total.rounding > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA on this machine")
@pytest.mark.parametrize("option", ["gated", "learned"])
def test_a_gpu(option):
    model = tiny_model(**SHALLOW[option])
    for dtype in (torch.float64, torch.float32):
        found = compare(model.to(dtype), disguise(model.to(dtype)), device="cuda")
        assert found.verdict == "disguise" and found.total.distance <= DISTANCE[dtype]
