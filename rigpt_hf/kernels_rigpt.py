"""
Kernels: products of few rows the other way round, where packed texts begin, a loss without copies, one gradient of a
table that both ends share.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.loss.loss_utils import ForCausalLMLoss


# Up to so many rows `W xᵀ` beats `x Wᵀ` on CPUs, for matrices of at least so many numbers. Models of smaller ones stay
# in the cache from one token to the next, where `x Wᵀ` is quicker.
FEW_ROWS, STREAMED = 4, 2**19

# As the library has them, before anybody puts something in their place to see what is computed.
FORWARD = {kind: kind.forward for kind in (nn.Linear, nn.Embedding)}

# Rows are worked on in blocks of so many logits: small enough to stay in cache and in already mapped memory.
BLOCK = {"cpu": 2**19}
DEFAULT_BLOCK = 2**24


def linear(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `module(hidden_states)`, quickly for few rows on a CPU, as in cached generation.

    There weights come from memory for each token. BLAS computes `x Wᵀ` at a fraction of the bandwidth, on one thread,
    but `W xᵀ` of two to four columns at nearly all of it. Same product, other order of operands; `make bench` shows
    what it brings. Only for a plain `nn.Linear` that nobody else has to see called: no hook, adapter, quantizer,
    subclass of tensors, derivative, compiler or export.

    Args:
        module: A linear map of `[..., n]`, or what somebody has put in its place.
        hidden_states (`torch.Tensor` of shape `[..., n]`).
    """
    if not _is_plain(module, hidden_states):
        return module(hidden_states)
    columns = hidden_states.reshape(-1, module.in_features)
    if len(columns) == 1:  # a single column would be a matrix-vector product again
        output = (module.weight @ torch.cat((columns, columns)).t())[:, 0].contiguous()
    else:
        output = (module.weight @ columns.t()).t().contiguous()
    if module.bias is not None:
        output += module.bias
    return output.view(*hidden_states.shape[:-1], module.out_features)


def _is_plain(module: nn.Module, hidden_states: torch.Tensor) -> bool:
    # What small models have most of comes first: asking them everything takes as long as their products do.
    weight = module._parameters.get("weight")
    if (
        type(module) is not nn.Linear  # adapters, quantizers and parametrizations have classes of their own
        or type(weight) is not nn.Parameter  # a quantised or sharded subclass, which knows better
        or weight.numel() < STREAMED
        or torch.is_grad_enabled()
        or is_recorded()  # which may want to leave the number of rows open
        or type(hidden_states) is not torch.Tensor
        or hidden_states.device.type != "cpu"
        or hidden_states.dtype != torch.float32
        or not 0 < hidden_states.numel() <= FEW_ROWS * module.in_features
    ):
        return False
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and _nobody_watches(module)
        and not torch.is_autocast_enabled("cpu")
    )


def is_recorded() -> bool:
    """Whether operations are being written down, to be compiled, exported or run elsewhere."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _nobody_watches(module: nn.Module) -> bool:
    """Whether nobody sees a call of the module, or has replaced what it does, as offloading does."""
    hooks = [hook for hook in module._forward_hooks.values() if not _asks_for_gradients(hook)]
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return (
        "forward" not in module.__dict__
        and type(module).forward is FORWARD.get(type(module))
        and not (hooks or others or _has_any_global_hook())
        and not torch._C._len_torch_function_stack()
    )


def _asks_for_gradients(hook: Any) -> bool:
    """Whether a hook is the library's, of recomputation, that only lets embeddings have a gradient."""
    return getattr(hook, "__qualname__", "").endswith("enable_input_require_grads.<locals>.make_inputs_require_grads")


def _functions_are_transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, which want more of a function than its gradient."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def tied_ends(
    table: nn.Module | None, head: nn.Module, ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """
    Embeddings `[..., D]` of tokens, and the table `[V, D]` for the head, whose gradients become one; or `None` twice.

    Autograd fills a table with zeros for the gradient of the few tokens that are looked up, and adds it to the head's.
    Here their rows are added to the head's gradient where it is. `make bench` shows what that brings. Only for plain
    modules on a CPU that train one parameter, in numbers of 32 bits or more, and outside of the compiler and of
    transformations of functions.

    Args:
        table: The embedding of tokens, or what somebody has put in its place.
        head: The linear map to logits, or what somebody has put in its place.
        ids: The tokens, if there are any.
    """
    if (
        not torch.is_grad_enabled()
        or table is None
        or (type(table), type(head), type(ids)) != (nn.Embedding, nn.Linear, torch.Tensor)
        or is_recorded()
        or _functions_are_transformed()
    ):
        return None, None
    weight = table._parameters.get("weight")
    if (
        weight is not head._parameters.get("weight")
        or type(weight) is not nn.Parameter
        or not weight.requires_grad
        or weight.device.type != "cpu"
        or weight.element_size() <= 2
        or (table.padding_idx, table.max_norm, table.scale_grad_by_freq, head.bias) != (None, None, False, None)
        or not (_nobody_watches(table) and _nobody_watches(head))
    ):
        return None, None
    return _TiedEnds.apply(weight, ids)


class _TiedEnds(torch.autograd.Function):
    """Rows of a table, and the table."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return nn.functional.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, of_rows: torch.Tensor | None, of_table: torch.Tensor | None) -> tuple:
        (ids,) = ctx.saved_tensors
        if of_rows is None:
            return of_table, None
        if of_table is None:
            of_table = of_rows.new_zeros(ctx.shape)
        # What came from the head is nobody else's, unless it is derived once more.
        add = of_table.index_add if torch.is_grad_enabled() else of_table.index_add_
        return add(0, ids.flatten(), of_rows.reshape(-1, ctx.shape[1])), None


def packed_lengths(position_ids: torch.LongTensor, batch_size: int) -> dict[str, Any]:
    """
    Where packed sequences begin, for flash attention, which is given no mask and would let them see each other.

    Args:
        position_ids: `[B or 1, S]`; a sequence begins where they do not go up by one.
        batch_size: B.

    Returns:
        The arguments of the library for sequences of different lengths, with `N + 1` offsets into all `B·S` positions;
        nothing if every row is one sequence.
    """
    goes_on = position_ids.diff(dim=-1) == 1
    if bool(goes_on.all()):
        return {}
    begins = ~nn.functional.pad(goes_on, (1, 0)).expand(batch_size, -1).flatten()
    offsets = nn.functional.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)
    longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}


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
    rows = logits.reshape(-1, vocab_size)
    if _functions_are_transformed():
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = nn.functional.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum")
    else:
        total = _SummedCrossEntropy.apply(rows, targets, counted)
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
        # As many gradients as were asked for at once, which those of `logits` would not hold.
        grad_logits = weight.new_empty(logits.shape, dtype=logits.dtype)
        for rows in _blocks(logits):
            probabilities = (logits[rows].to(normaliser.dtype) - normaliser[rows, None]).exp()
            grad_logits[rows] = (probabilities * weight[rows]).to(logits.dtype)
        return grad_logits.scatter_add_(1, targets, -weight.to(logits.dtype)), None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows of about the size that suits the device."""
    step = max(1, BLOCK.get(logits.device.type, DEFAULT_BLOCK) // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
