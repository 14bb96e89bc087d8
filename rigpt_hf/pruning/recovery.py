"""Recovery: the smaller model learns the distributions that the larger gives, instead of the text."""

import copy

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modeling_rigpt import RiGPTForCausalLM
from ..optim import EquivariantOptimizer, equivariant_param_groups


# Share of the steps in which the rate rises; it falls to zero in the others.
WARMUP = 0.05


def recovered(
    model: RiGPTForCausalLM,
    teacher: RiGPTForCausalLM,
    tokens: torch.Tensor,
    steps: int,
    *,
    learning_rate: float = 1e-4,
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
        learning_rate (`float`, defaults to 1e-4): the highest; of the equivariant optimizer, so that the frame that
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
        raise ValueError(f"`learning_rate` must be positive, got {learning_rate}. Take 1e-4 or so.")
    student = copy.deepcopy(model).float().eval()
    optimizer = EquivariantOptimizer(equivariant_param_groups(student, learning_rate, weight_decay=0.0))
    warmup = max(1, int(WARMUP * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch // len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(rounds)])
    with tqdm(total=steps, desc="Recovering", unit="step", disable=not progress) as bar:
        for step in range(steps):
            rows = tokens[order[step * batch : (step + 1) * batch]]
            with torch.no_grad():
                target = teacher(rows, use_cache=False).logits.float().log_softmax(dim=-1)
            logits = student(rows, use_cache=False).logits.log_softmax(dim=-1)
            loss = nn.functional.kl_div(logits, target, reduction="none", log_target=True).sum(-1).mean()
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"`learning_rate` must keep losses finite, got {learning_rate} and NaN or infinity in step "
                    f"{step + 1}. Take a smaller one."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.set_postfix_str(f"KL {float(loss.detach()):.4f}")
            bar.update()
    return student.to(model.dtype)
