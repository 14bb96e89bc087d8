"""Recovery: the smaller model learns the distributions that the larger gives, instead of the text."""

import copy

import torch

from ..modeling_rigpt import RiGPTForCausalLM
from ..optim import EquivariantOptimizer, equivariant_param_groups
from ..quantization.tuning import learn_logits


def recovered(
    model: RiGPTForCausalLM,
    teacher: RiGPTForCausalLM,
    tokens: torch.Tensor,
    steps: int,
    *,
    learning_rate: float = 3e-5,
    batch: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> RiGPTForCausalLM:
    """
    A copy of a model after some steps that lower `KL(teacher || model)` of the next token.

    Args:
        model, teacher (`RiGPTForCausalLM`): stay as they are.
        tokens (`torch.Tensor` of shape `[N, S]`): windows to learn on, over and over in a drawn order.
        steps (`int`): their number.
        learning_rate (`float`, defaults to 3e-5): the highest; of the equivariant optimizer, so that the frame that
            the model comes in does not matter.
        batch (`int`, defaults to 1): windows of a step.
        seed (`int`, defaults to 0): of the order.
        progress (`bool`, defaults to `False`): show a progress bar.

    Returns:
        `RiGPTForCausalLM`: in evaluation mode, of the model's dtype.

    Raises:
        ValueError: if a loss is not finite.
    """
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` must be positive, got {learning_rate}. Take 3e-5 or so.")
    student = copy.deepcopy(model).float().eval()
    optimizer = EquivariantOptimizer(equivariant_param_groups(student, learning_rate, weight_decay=0.0))
    learn_logits(
        student, teacher, tokens, optimizer, steps, batch=batch, seed=seed, desc="Recovering", progress=progress
    )
    return student.to(model.dtype)
