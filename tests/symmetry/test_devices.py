"""
The search on a device. No GPU is needed: a stand-in keeps numbers on the CPU and refuses what a GPU would refuse.

Under [`StandIn`] a tensor that is moved to `DEVICE`, or made there, is marked, and so is what is computed from it. It is
no GPU: sums have the order that they have on a CPU, so results must be the same bit for bit.
"""

import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map

from rigpt_hf.symmetry import compare
from rigpt_hf.symmetry.given import given
from rigpt_hf.symmetry.layered import Found, search_layers
from tests.models import noisy, over, tiny_model
from tests.symmetry.options import SEARCHED, SHALLOW, disguise
from tests.tolerances import DISTANCE


DEVICE, CPU = torch.device("cuda"), torch.device("cpu")
PRODUCTS = {"matmul", "addmm_", "mul", "sum", "vector_norm"}
DECOMPOSITIONS = {"svd", "eigh", "inv", "pinv", "svdvals", "slogdet"}
# Where a block comes to the device, and every other place that moves tensors, with options by which a search comes there.
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


class OnDevice(torch.Tensor):
    """A tensor that is said to be on `DEVICE`."""


class StandIn(TorchFunctionMode):
    """
    While entered, `DEVICE` is there.

    Args:
        broken: The function in which nothing moves.

    Attributes:
        seen: How often functions have got tensors there.
        moved: How often functions of ours have moved a tensor, or would have.
    """

    def __init__(self, broken: str = " "):
        super().__init__()
        self.broken, self.seen, self.moved = broken, Counter[str](), Counter[str]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or func.__name__).replace("Tensor.", "").removeprefix("torch.")
        # What a tensor is moved to takes no part in the move.
        tensors = list(tensors_in(args[:1] if name == "to" else (*args, *(kwargs or {}).values())))
        is_here = [isinstance(each, OnDevice) for each in tensors]
        if name == "device.__get__":
            return DEVICE if any(is_here) else CPU
        with torch._C.DisableTorchFunctionSubclass():
            device, args, kwargs = without_device(name, args, kwargs or {})
            if device is not None and tensors and device != (DEVICE if is_here[0] else CPU):
                caller = sys._getframe(1).f_code.co_qualname
                self.moved[caller] += 1
                device = None if caller.startswith(self.broken) else device
            if any(is_here) and device is None:
                if any(each.dim() for each, here in zip(tensors, is_here, strict=True) if not here):
                    raise RuntimeError(f"{name} got tensors on two devices")
                if name == "numpy":
                    raise TypeError("a tensor on a device has no numpy")
            kind = torch.Tensor if (device or (DEVICE if any(is_here) else CPU)) == CPU else OnDevice
            result = func(*args, **kwargs)
        if any(is_here):
            self.seen[name.removeprefix("linalg.")] += 1
        return placed(result, kind)


def tensors_in(arguments) -> Iterator[torch.Tensor]:
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)


def placed(result, kind: type):
    """What a function gave, its tensors of one kind; those that are it already are the same objects."""

    def place(each):
        is_there = not isinstance(each, torch.Tensor) or isinstance(each, OnDevice) == (kind is OnDevice)
        return each if is_there else each.as_subclass(kind)

    return tree_map(place, result) if isinstance(result, list | tuple) else place(result)


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
    """A short search between two relatives."""
    a = tiny_model(**SHALLOW[option]).to(dtype)
    b = disguise(noisy(a, 0.05))
    return search_layers(given(a), given(b), dtype, max_sweeps=2, **where)


def elements_of(found: Found) -> dict[str, torch.Tensor]:
    elements = found.transformation.elements
    assert len(elements) > 4 and not any(isinstance(element, OnDevice) for element in elements.values())
    return elements


@over([*SEARCHED, "gated", "multi-head", "learned", "experts-shared", "norm-bias-vector"], SHALLOW)
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
    assert all(device.seen[name] >= 12 for name in PRODUCTS), "the work was done elsewhere"
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
        expected = compare(model, rounded)
        assert not device.seen, "there is none"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert compare(model, rounded, device="cpu").to_dict() == expected.to_dict()
        assert not device.seen, "it was not asked for"
        found = compare(model, rounded)
    assert all(device.seen[name] >= 12 for name in PRODUCTS)
    assert found.to_dict() == expected.to_dict()
    assert found.verdict == "disguise" and found.total.rounding > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA on this machine")
@pytest.mark.parametrize("option", ["gated", "learned"])
def test_a_gpu(option):
    model = tiny_model(**SHALLOW[option])
    for dtype in (torch.float64, torch.float32):
        found = compare(model.to(dtype), disguise(model.to(dtype)), device="cuda")
        assert found.verdict == "disguise" and found.total.distance <= DISTANCE[dtype]
