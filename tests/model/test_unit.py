"""`n(x)` in few calls: the formula in every dtype and way of being called, with derivatives of all orders."""

import pytest
import torch
from torch import nn
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from rigpt_hf import norms_rigpt
from rigpt_hf.norms_rigpt import FEW_NUMBERS, unit
from tests.model.agreement import difference
from tests.tolerances import CONVERSION


EPS = 1e-3
SHAPES = [(8,), (1, 1, 192), (2, 3, 7), (5, FEW_NUMBERS // 4), (0, 8)]


def formula(states: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt()


def states_of(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 20).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learns", [False, True])
def test_it_is_the_formula(shape, dtype, learns):
    states = states_of(*shape, dtype=dtype).requires_grad_(learns)
    found = unit(states, EPS)
    assert found.dtype == dtype and found.shape == states.shape and found.requires_grad == learns
    assert found.is_contiguous()
    if not found.numel():
        return
    expected = formula(states.detach().double())
    error = difference(found.detach().double(), expected)
    # One cast to 16 bits, and a tenth of what accumulating in them would lose.
    assert error <= CONVERSION.get(dtype, 0.51 * torch.finfo(dtype).eps)
    assert difference(formula(states.detach().double(), 0.0), expected) > 0.05, "eps has no part in this"


def test_nothing_becomes_nothing_and_large_numbers_stay_finite():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        zero = torch.zeros(1, 16, dtype=dtype)
        assert torch.equal(unit(zero, EPS), zero)
        large = torch.full((1, 16), torch.finfo(dtype).max ** 0.4, dtype=dtype)
        assert torch.allclose(unit(large, EPS), torch.ones_like(large), rtol=1e-2)


def test_a_result_that_is_changed_in_place_gives_no_wrong_gradient():
    states = states_of(3, 8).requires_grad_()
    found = unit(states, EPS)
    found[:, 0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
    changed = unit(states, EPS).clone()
    changed[:, 0] = 0
    (gradient,) = torch.autograd.grad(changed.sum(), states)
    (expected,) = torch.autograd.grad(formula(states)[:, 1:].sum(), states)
    assert difference(gradient, expected) <= CONVERSION[torch.float64]


def test_a_gradient_inside_of_autocast_keeps_its_digits():
    states = states_of(3, 64, dtype=torch.float32).requires_grad_()
    direction = states_of(64, 3, dtype=torch.float32).mT
    (expected,) = torch.autograd.grad(unit(states, EPS), states, direction)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(unit(states, EPS), states, direction)
        lost = torch.linalg.vecdot(states.detach(), direction)
    assert difference(found, expected) <= CONVERSION[torch.float32]
    assert lost.dtype == torch.bfloat16 or difference(lost, (states.detach() * direction).sum(-1)) > 1e-4


def test_what_was_asked_in_inference_mode_serves_training():
    norms_rigpt._number.cache_clear()
    with torch.inference_mode():
        first = unit(states_of(2, 8), EPS)
    states = states_of(2, 8).requires_grad_()
    found = unit(states, EPS)
    found.sum().backward()
    assert torch.equal(found.detach(), first) and states.grad is not None
    with torch.device("meta"):
        norms_rigpt._number.cache_clear()
        assert unit(first, EPS).device.type == "cpu"


def test_derivatives_of_all_orders():
    states = states_of(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit(x, EPS), states, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: unit(x, EPS), states)
    third = [torch.func.jacrev(hessian(lambda x, f=f: f(x, EPS).pow(3).sum()))(states[0]) for f in (unit, formula)]
    assert difference(*third) < CONVERSION[torch.float64]


def test_transformations_of_functions():
    states, change = states_of(4, 6), states_of(4, 6).flip(0)
    short = states[0].bfloat16()
    outer = jacrev(lambda x: jacrev(lambda y: y * unit(x, EPS))(x).diagonal())(short)  # x is of the outer one alone
    assert difference(outer.double(), jacrev(formula)(short.double())) < 8 * torch.finfo(torch.bfloat16).eps
    for one, other in (
        (vmap(lambda x: unit(x, EPS))(states), formula(states)),
        *((turn(lambda x: unit(x, EPS))(states), turn(formula)(states)) for turn in (jacrev, jacfwd)),
        (vmap(jacrev(lambda x: unit(x, EPS)))(states), vmap(jacrev(formula))(states)),
        (jvp(lambda x: unit(x, EPS), (states,), (change,))[1], jvp(formula, (states,), (change,))[1]),
    ):
        assert difference(one, other) < CONVERSION[torch.float64]


def test_gradients_in_16_bits_are_rounded_once():
    states = states_of(3, 64, dtype=torch.bfloat16).requires_grad_()
    gradient = states_of(3, 64).flip(-1)
    (found,) = torch.autograd.grad(unit(states, EPS), states, gradient.bfloat16())
    accurate = states.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(accurate), accurate, gradient.bfloat16().double())
    assert found.dtype == torch.bfloat16
    assert difference(found.double(), expected) < 2 * torch.finfo(torch.bfloat16).eps


def test_it_is_compiled_exported_and_traced_without_a_function_of_our_own(monkeypatch):
    monkeypatch.setattr(norms_rigpt._Unit, "apply", None)
    states = states_of(3, 16).requires_grad_()
    found = torch.compile(lambda x: unit(x, EPS), backend="aot_eager", fullgraph=True)(states)
    assert difference(found.detach(), formula(states).detach()) < CONVERSION[torch.float64]

    class Module(nn.Module):
        def forward(self, x):
            return unit(x, EPS)

    targets = [str(node.target) for node in torch.export.export(Module(), (states,)).graph.nodes]
    assert any("rms_norm" in target for target in targets)
    with pytest.raises(TypeError):
        unit(states, EPS)


def test_what_backward_keeps_is_what_the_next_map_keeps_anyway():
    """The result, and a number for each vector: not the input."""
    kept: list[torch.Tensor] = []
    states = states_of(4, 32, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = unit(states, EPS)
    assert sorted(tensor.numel() for tensor in kept) == [4, 128]
    assert any(tensor.data_ptr() == found.data_ptr() for tensor in kept)
