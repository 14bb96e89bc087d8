"""
Scales and gains tuned to what the model itself says, codes fixed: `KL(model || rounded)` by Adam, on calibration text.

Scales and gains are changed by factors `exp(δ)`, so that no sign turns and one rate fits all.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .grid import Codes, half


if TYPE_CHECKING:
    from .recipe import Quantized

LEARNING_RATE = 2e-3
# The last step, relative to the first; warm-up, as a share of all steps.
LAST, WARM_UP = 0.05, 0.1
# Tokens of a step.
TOKENS = 512


class TunedLinear(nn.Module):
    """`x -> ((x gain) @ codesᵀ) scales + bias`, of which scales and gain learn."""

    def __init__(self, codes: Codes, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        gain = torch.ones(codes.codes.shape[1]) if codes.gain is None else codes.gain
        self.register_buffer("codes", codes.codes)
        self.register_buffer("scales", codes.scales.to(dtype))
        self.register_buffer("gain", gain.to(dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.scale_change = nn.Parameter(torch.zeros_like(self.scales))
        self.gain_change = nn.Parameter(torch.zeros_like(self.gain))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales `[m, groups]` and gain `[n]` as they are now."""
        return self.scales * self.scale_change.exp(), self.gain * self.gain_change.exp()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scales, gain = self.factors()
        output = _Product.apply(hidden_states * gain, self.codes, scales)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """`x @ (codes · scales)ᵀ`, whose matrix is made again where it is needed: only codes are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        rows, columns = x.flatten(0, -2), codes.to(x.dtype)
        if scales.shape[1] == 1:
            output = rows @ columns.T
            ctx.save_for_backward(output, codes, scales)
            output = output * scales[:, 0]
        else:
            ctx.save_for_backward(rows, codes, scales)
            output = rows @ _scaled(columns, scales).T
        return output.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        kept, codes, scales = ctx.saved_tensors
        columns, rows = codes.to(gradient.dtype), gradient.flatten(0, -2)
        if scales.shape[1] == 1:
            of_scales = (rows * kept).sum(0)[:, None]
            of_x = (rows * scales[:, 0]) @ columns
        else:
            of_scales = (rows.T @ kept * columns).reshape(*scales.shape, -1).sum(-1)
            of_x = rows @ _scaled(columns, scales)
        return of_x.view(*gradient.shape[:-1], codes.shape[1]), None, of_scales


def _scaled(columns: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (columns.reshape(*scales.shape, -1) * scales[..., None]).reshape(columns.shape)


def tuned(
    quantized: "Quantized",
    tokens: torch.Tensor,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Codes]:
    """
    The codes of a rounded model with other scales and gains, such that its logits are nearer to those of the model.

    Args:
        quantized: A rounded model, which is left as it is; what it simulates has no part in this.
        tokens (`torch.Tensor` of shape `[N, S]`): Token ids, drawn anew when all windows were seen.
        steps, learning_rate, seed: Of Adam, with about 512 tokens in a step.
        progress (`bool`): Show a progress bar.

    Returns:
        `dict[str, Codes]`: by the names of modules, numbers of half precision.

    Raises:
        ValueError: if the loss becomes infinite or no number.
    """
    teacher = quantized.model.eval()
    student = copy.deepcopy(teacher)
    student.requires_grad_(False)
    modules, layers = dict(student.named_modules()), {}
    for name, codes in quantized.codes.items():
        module = modules[name]
        if isinstance(module, nn.Linear) and name not in quantized.turns:
            layers[name] = TunedLinear(codes, module.bias, module.weight.dtype).to(module.weight.device)
            owner, _, own = name.rpartition(".")
            setattr(modules[owner], own, layers[name])
        elif isinstance(module, nn.Linear | nn.Embedding) and name not in quantized.turns:
            with torch.no_grad():
                module.weight.copy_(codes.dense(module.weight.dtype))
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))
    batch = max(1, TOKENS // tokens.shape[1])
    learn_logits(student, teacher, tokens, optimizer, steps, batch=batch, seed=seed, desc="Tuning", progress=progress)
    return {name: _result(quantized.codes[name], layer) for name, layer in layers.items()}


@torch.enable_grad()
def learn_logits(
    student: nn.Module,
    teacher: nn.Module,
    tokens: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    batch: int,
    seed: int,
    desc: str,
    progress: bool,
    autocast: torch.dtype | None = None,
) -> None:
    """
    Lower `KL(teacher || student)` of the next token by some steps of an optimizer, in place.

    Args:
        student, teacher: Causal language models; the second is left as it is.
        tokens (`torch.Tensor` of shape `[N, S]`): Token ids, drawn anew when all windows were seen.
        optimizer: Of what learns in the first; its rates rise, and fall again.
        steps, batch, seed: Their number, the windows of each, and what the order is drawn from.
        desc, progress: Name of the progress bar, and whether there is one.
        autocast: Dtype of products, where it is not that of the weights.

    Raises:
        ValueError: if the loss becomes infinite or no number.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order: list[int] = []
    with tqdm(range(steps), desc=desc, unit="step", disable=not progress) as bar:
        for step in bar:
            while len(order) < batch:
                order += torch.randperm(len(tokens), generator=generator).tolist()
            chosen, order = order[:batch], order[batch:]
            rows = tokens[chosen].to(next(student.parameters()).device)
            # Anew in every step: inside of it rounded weights are kept.
            with torch.autocast(rows.device.type, autocast, enabled=autocast is not None):
                with torch.no_grad():
                    wanted = _log_probabilities(teacher, rows)
                ours = _log_probabilities(student, rows)
            loss = nn.functional.kl_div(ours, wanted, reduction="sum", log_target=True) / rows.numel()
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"`learning_rate` must leave losses finite, got {optimizer.param_groups[0]['initial_lr']:g} and "
                    f"{loss.item()} in step {step + 1}. Take a lower one."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(kl=f"{loss.item():.4f}")


def _rate(step: int, steps: int) -> float:
    """Up in the beginning, then down in a line."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else LAST + (1 - LAST) * (steps - step) / max(1, steps - warm)


def _log_probabilities(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.no_grad()
def _result(codes: Codes, layer: TunedLinear) -> Codes:
    scales, gain = (half(factor.float()) for factor in layer.factors())
    return Codes(codes.codes, scales.to(codes.scales.device), codes.bits, codes.group, gain.to(codes.scales.device))
