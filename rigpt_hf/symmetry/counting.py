"""How many parameters are redundant: counted from the table, and measured as the rank deficiency of the network."""

from typing import NamedTuple

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of


# Backward passes that run at once; the memory of each stays small beside the spectrum's.
AT_ONCE = 64


def redundant_dimensions(config: RiGPTConfig) -> dict[str, int]:
    """
    The dimension of the gauge group by frame, and their sum under `"total"`: so many directions of parameter space
    change nothing.

    A generic model has no others as long as `head_dim` is at most `hidden_size`, `embedding_size` is at most
    `hidden_size`, or equal to it where positions are rotary, and there are at least as many tokens as dimensions: then
    the total equals the rank deficiency of the Jacobian, which [`jacobian_spectrum`] measures (less `local`, as the
    maps between local frames are frozen, or less `stream` with `post_norm`, whose `carry` is). Beyond that the two
    differ: wider frames have directions that no weight fills, and with rotary positions the first layer reads only the
    range of a narrow `project_in`. Its queries and keys then depend on their token alone, and more than `h(h+1)/2`
    tokens must look at a metric behind their norm (`qk_norm_gain`), at those of all heads together (`qk_norm_over`) so
    many for each head, and two of these must fit into the stream, `2 head_dim <= hidden_size`; as many at lengths of
    keys with a bias behind their norm (`qk_norm_bias` and a score with distances); and more than
    `d(d+1)/2` at the lengths behind `project_in` with `embedding_norm_map`. With `use_parallel_residual` the first
    layer's MLP then reads nothing but tokens, and no more of its weights count than `vocab_size * hidden_size`.
    Frequencies of rotary positions, and gains of one plane, are taken to be distinct.

    For feedforward nets, neural ODEs and transformers the redundancy is read as a gauge symmetry in arXiv 2402.02362.
    """
    table = table_of(config)
    parts = dict.fromkeys(table.kinds, 0)
    for key, frame in table.frames.items():
        parts[key.kind] += frame.group.dimension * frame.copies
    return parts | {"total": sum(parts.values())}


class JacobianSpectrum(NamedTuple):
    """
    The derivative of a network's logits by its parameters.

    Args:
        singular_values (`torch.Tensor` of shape `[parameters]`): in descending order.
        rank (`int`): how many are not zero, judged by the widest gap in the lower half of the logarithms.
        deficiency (`int`): parameters minus rank.
        gap (`float`): the ratio between the last singular value that counts and the first that does not.
    """

    singular_values: torch.Tensor
    rank: int
    deficiency: int
    gap: float


def jacobian_spectrum(
    model: nn.Module, input_ids: torch.Tensor, generator: torch.Generator | None = None, surplus: int = 20
) -> JacobianSpectrum:
    """
    Singular values of the Jacobian of all logits on `input_ids` `[B, S]` by all parameters.

    Its rows are drawn as random combinations of logits, `surplus` more than there are parameters, each one backward
    pass: for models of some hundred parameters, in float64. The inputs must exercise every parameter (all tokens, all
    positions) and give more logits than there are parameters.

    Raises:
        ValueError: if there are fewer logits than rows.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in parameters)
    was_training = model.training
    logits = model.eval()(input_ids, use_cache=False).logits
    model.train(was_training)
    if logits.numel() < size + surplus:
        raise ValueError(
            f"`input_ids` must give at least {size + surplus} logits to see {size} parameters, got {logits.numel()}. "
            "Give more sequences."
        )
    # One at a time: which numbers are drawn does not depend on how many backward passes run at once.
    draws = [torch.randn(logits.shape, generator=generator, dtype=torch.float64) for _ in range(size + surplus)]
    rows = []
    for batch in torch.stack(draws).to(logits).split(AT_ONCE):
        gradients = torch.autograd.grad(
            logits, parameters, batch, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.flatten(1) for gradient in gradients], 1))
    values = torch.linalg.svdvals(torch.cat(rows).double())
    logarithms = values.clamp_min(values[0] * 1e-20).log()
    # A redundant direction is zero up to rounding, the weakest real one is orders of magnitude above it.
    candidates = (logarithms[:-1] - logarithms[1:]).where(logarithms[1:] < logarithms[0] - 16, torch.tensor(0.0))
    if candidates.max() < 5:
        return JacobianSpectrum(values, size, 0, float("inf"))
    rank = int(candidates.argmax()) + 1
    return JacobianSpectrum(values, rank, size - rank, float(candidates.max().exp()))
