"""The lean loss is the library's loss: value, gradients, second derivatives, every keyword."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from rigpt_hf import kernels_rigpt
from rigpt_hf.kernels_rigpt import causal_lm_loss
from tests.models import tiny_model, tokens
from tests.tolerances import SYMMETRY


VOCABULARY = 50


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 9, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (2, 9), generator=generator)
    labels[0, :4] = -100
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("keywords", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(5)}], ids=str)
@pytest.mark.parametrize("block", [1, 2**19], ids=["many-blocks", "one-block"])
def test_value_and_gradient_are_those_of_the_library(monkeypatch, keywords, block):
    monkeypatch.setitem(kernels_rigpt.BLOCK, "cpu", block)
    logits, labels = case(torch.float32)
    ours = causal_lm_loss(logits, labels, VOCABULARY, **keywords)
    theirs = ForCausalLMLoss(logits, labels, VOCABULARY, **keywords)
    (our_gradient,), (their_gradient,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    assert abs(ours - theirs) <= SYMMETRY[torch.float32] * abs(theirs)
    assert (our_gradient - their_gradient).abs().max() <= SYMMETRY[torch.float32] * their_gradient.abs().max()
    assert their_gradient.abs().max() > 0.01
    assert not our_gradient[0, :3].any(), "a label that does not count has a gradient"


def test_shifted_labels_and_another_ignored_label():
    logits, labels = case(torch.float32)
    labels = labels.where(labels != -100, 3)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=3)[..., 1:]
    expected = ForCausalLMLoss(logits, labels, VOCABULARY, ignore_index=3)
    for ours in (
        causal_lm_loss(logits, labels, VOCABULARY, ignore_index=3),
        causal_lm_loss(logits, None, VOCABULARY, ignore_index=3, shift_labels=shifted),
    ):
        assert abs(ours - expected) <= SYMMETRY[torch.float32] * expected


def test_first_and_second_derivatives_in_float64():
    logits, labels = case(torch.float64)
    logits = logits[..., :8].detach().requires_grad_()
    labels = labels.where(labels == -100, labels % 8)
    assert torch.autograd.gradcheck(lambda x: causal_lm_loss(x, labels, 8), logits, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: causal_lm_loss(x, labels, 8), logits, check_batched_grad=True)


def test_half_precision_sums_in_single():
    logits, labels = case(torch.bfloat16)
    ours, theirs = causal_lm_loss(logits, labels, VOCABULARY), ForCausalLMLoss(logits, labels, VOCABULARY)
    assert ours.dtype is torch.float32
    assert abs(ours - theirs) <= SYMMETRY[torch.float32] * theirs
    assert torch.autograd.grad(ours, logits)[0].dtype is torch.bfloat16


def test_no_labels_that_count_give_what_the_library_gives():
    logits, labels = case(torch.float32)
    nothing = torch.full_like(labels, -100)
    assert causal_lm_loss(logits, nothing, VOCABULARY).isnan()
    assert ForCausalLMLoss(logits, nothing, VOCABULARY).isnan()


def test_a_user_may_bring_a_loss():
    model = tiny_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 42
    ids = tokens(1, 5)
    assert model(ids, labels=ids).loss == 42
