"""The effect of a rotation of the hidden space on a RiGPT and on the stock model."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..conversion.stock_rotation import rotate_stock
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry import GaugeTransformation, gauge_error


@dataclass
class Effect:
    """Measured before and after a rotation. Relative numbers are max |difference| / max |value|."""

    logits: float
    hidden_states: float
    weights: float
    equivariance: float
    loss_before: float
    loss_after: float
    greedy: tuple[str, str]
    sampled: tuple[str, str]
    pictures: tuple[torch.Tensor, torch.Tensor]
    """Hidden states `[tokens, d]` of the first window in the middle of the network."""


@dataclass
class Sweep:
    """Along the geodesic from the identity to a rotation: loss and relative logit error of both models."""

    t: list[float] = field(default_factory=list)
    rigpt_loss: list[float] = field(default_factory=list)
    stock_loss: list[float] = field(default_factory=list)
    rigpt_error: list[float] = field(default_factory=list)
    stock_error: list[float] = field(default_factory=list)


@torch.no_grad()
def mean_loss(model: Any, windows: torch.Tensor) -> float:
    """Loss in nats per token on `windows` `[batch, seq]`."""
    return model(windows, labels=windows, use_cache=False).loss.item()


def continue_text(
    model: Any, tokenizer: Any, prompt: str, *, sample: bool, new_tokens: int = 40, seed: int = 0
) -> str:
    """The prompt and its continuation by the model; sampling repeats with its seed."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    room = max(1, min(new_tokens, model.config.max_position_embeddings - length))
    output = model.generate(
        **inputs,
        max_new_tokens=room,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": True, "top_k": 50, "temperature": 0.7} if sample else {"do_sample": False}),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def continue_both(models: tuple[Any, Any], tokenizer: Any, prompt: str, *, sample: bool) -> tuple[str, str]:
    """The continuations of a prompt by two models; sampling starts from the same seed."""
    before, after = (continue_text(model, tokenizer, prompt, sample=sample) for model in models)
    return before, after


@torch.no_grad()
def measure_effect(
    model: RiGPTForCausalLM, g: GaugeTransformation, tokenizer: Any, windows: torch.Tensor, prompt: str
) -> Effect:
    """Everything that should change under `g`, and everything that should not."""
    turned = g(model)
    before = model(windows, output_hidden_states=True).hidden_states
    after = turned(windows, output_hidden_states=True).hidden_states
    rotation = g.elements["stream"][0].to(windows.device)
    followed = [x.to(torch.float64) @ rotation.T for x in before]
    pairs = list(zip(model.parameters(), turned.parameters(), strict=True))
    middle = len(before) // 2
    return Effect(
        logits=gauge_error(model, g, windows),
        hidden_states=max(relative(y, x) for x, y in zip(before, after, strict=True)),
        weights=max(relative(y, x) for x, y in pairs if x.any()),
        equivariance=max(relative(y, x) for x, y in zip(followed, after, strict=True)),
        loss_before=mean_loss(model, windows),
        loss_after=mean_loss(turned, windows),
        greedy=continue_both((model, turned), tokenizer, prompt, sample=False),
        sampled=continue_both((model, turned), tokenizer, prompt, sample=True),
        pictures=(before[middle][0].float().cpu(), after[middle][0].float().cpu()),
    )


@torch.no_grad()
def sweep(
    model: RiGPTForCausalLM, stock: Any, g: GaugeTransformation, windows: torch.Tensor, points: int, tick: Any
) -> Sweep:
    """Both models at equally spaced points of the geodesic to the rotation `g` of the stream."""
    result = Sweep()
    logits = stock(windows, use_cache=False).logits
    for index in range(points):
        t = index / (points - 1)
        here = g.at(t)
        turned_stock = rotate_stock(stock, here.elements["stream"][0])
        result.t.append(t)
        result.rigpt_error.append(gauge_error(model, here, windows))
        result.stock_error.append(relative(turned_stock(windows, use_cache=False).logits, logits))
        result.rigpt_loss.append(mean_loss(here(model), windows))
        result.stock_loss.append(mean_loss(turned_stock, windows))
        tick()
    return result


@torch.no_grad()
def next_token_probabilities(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """Distribution `[V]` over the token after the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    return model(**inputs, logits_to_keep=1).logits[0, -1].double().softmax(dim=-1).cpu()


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """max |value - reference| / max |reference|."""
    reference = reference.to(torch.float64)
    return ((value.to(torch.float64) - reference).abs().max() / reference.abs().max().clamp_min(1e-300)).item()
