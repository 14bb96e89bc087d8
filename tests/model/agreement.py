"""What the tests of the model mean by "the same": the largest difference, relative to the largest value."""

import torch

from tests.tolerances import SYMMETRY


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two tensors of the same shape over the largest value of the expected one."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    assert actual.numel(), "nothing to compare"
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: str = ""):
    """The same up to rounding in the dtype of the expected tensor."""
    error = difference(actual, expected)
    assert error <= SYMMETRY[expected.dtype], f"{what} differs by {error:.2e}"


def assert_different(actual: torch.Tensor, expected: torch.Tensor, what: str = ""):
    """The negative control: further apart than any rounding in single precision."""
    error = difference(actual, expected)
    assert error > 10 * SYMMETRY[torch.float32], f"{what} differs by {error:.2e} only; the test above sees nothing"


def assert_same_gradients(actual: torch.nn.Module, expected: torch.nn.Module):
    """Gradients of two models with the same parameters, relative to their own size or a hundredth of the largest."""
    largest = max(parameter.grad.abs().max().item() for parameter in expected.parameters() if parameter.requires_grad)
    for (name, a), (_, b) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        if not b.requires_grad:
            assert a.grad is None and b.grad is None, f"{name} is frozen"
            continue
        scale = max(b.grad.abs().max().item(), largest / 100)
        error = (a.grad - b.grad).abs().max().item() / scale
        assert error <= SYMMETRY[b.dtype], f"the gradient of {name} differs by {error:.2e}"


def recompute_activations(model, reentrant: bool = False):
    """Gradient checkpointing under the name that this version of Transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
