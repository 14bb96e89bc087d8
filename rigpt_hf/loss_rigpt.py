"""The causal language-modelling loss, without the copies of the logits that the general one makes."""

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss


# Rows are worked on in blocks of so many logits: small enough to stay in cache and in already mapped memory.
BLOCK = {"cpu": 2**19}
DEFAULT_BLOCK = 2**24


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Mean cross entropy of the next token, in nats; the library's `ForCausalLMLoss` in less memory and time.

    The general loss holds a float32 copy of the logits, their log-softmax and two gradients of that size. Here the
    forward pass keeps one number per position, and the backward pass writes the only gradient there has to be. Sums
    are in float32, or in float64 for float64 logits.

    Args:
        logits (`torch.Tensor` of shape `[B, S, V]`).
        labels (`torch.Tensor` of shape `[B, S]`): The tokens at the same positions; shifted here.
        vocab_size (`int`): `V`.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Divides the sum instead of the number of labels here, so that accumulated gradients add up right.
        ignore_index (`int`, defaults to -100): Label of positions that do not count.
        shift_labels (`torch.Tensor` of shape `[B, S]`, *optional*): Labels that are shifted already.
    """
    if torch.compiler.is_compiling() or type(logits) is not torch.Tensor:
        # The compiler fuses the plain formula by itself; sharded logits know how to sum over their shards.
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    counted = targets != ignore_index
    total = _SummedCrossEntropy.apply(logits.reshape(-1, vocab_size), targets, counted)
    return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over counted rows of `logsumexp(logits) - logits[target]`."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        targets = targets.where(counted, 0)[:, None]
        accurate = torch.promote_types(logits.dtype, torch.float32)
        normaliser = logits.new_empty(len(logits), dtype=accurate)
        for rows in _blocks(logits):
            normaliser[rows] = logits[rows].to(accurate).logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, counted, normaliser)
        losses = normaliser - logits.gather(1, targets).squeeze(1).to(accurate)
        return losses.where(counted, 0).sum()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        logits, targets, counted, normaliser = ctx.saved_tensors
        weight = (grad * counted).to(normaliser.dtype)[:, None]
        if torch.is_grad_enabled():  # a second derivative is wanted, and the saved normaliser has none
            probabilities = logits.to(normaliser.dtype).softmax(dim=-1)
            return (probabilities * weight).scatter_add(1, targets, -weight).to(logits.dtype), None, None
        grad_logits = torch.empty_like(logits)
        for rows in _blocks(logits):
            probabilities = (logits[rows].to(normaliser.dtype) - normaliser[rows, None]).exp()
            grad_logits[rows] = (probabilities * weight[rows]).to(logits.dtype)
        return grad_logits.scatter_add_(1, targets, -weight.to(logits.dtype)), None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows of about the size that suits the device."""
    step = max(1, BLOCK.get(logits.device.type, DEFAULT_BLOCK) // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
