"""Routes of tokens to experts: which those are, how far two models share them, and one model on those of another.

Shapes: `L` layers with experts, `B` batch, `S` seq, `N = B·S` tokens, `E` experts, `k` experts per token. Routes are
booleans `[L, B, S, E]`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def has_router(config: Any) -> bool:
    """Whether models with this configuration send tokens to experts, and can say where."""
    return getattr(config, "output_router_logits", None) is not None and bool(experts_per_token(config))


def experts_per_token(config: Any) -> int:
    """The experts that each token goes to; 0 without experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return int(config.num_experts_per_tok) if experts else 0


def routes_of(config: Any, router_logits: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor | None:
    """The routes of a batch of this shape; `None` without routers."""
    if not router_logits:
        return None
    logits = torch.stack([one.cpu() for one in router_logits])
    chosen = logits.topk(experts_per_token(config), dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True).unflatten(1, shape)


def in_places_of(a: torch.Tensor, b: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """
    The routes `a` with experts in the places where another model, whose own routes are `b`, has them.

    Experts may have changed places: pairs are those that share most kept tokens, most of all first.
    """
    placed = a.clone()
    for layer, (ours, theirs) in enumerate(zip(a[:, kept], b[:, kept], strict=True)):
        shared = theirs.double().T @ ours.double()  # [E of b, E of a]
        places = torch.arange(len(shared))
        for _ in places:
            place, expert = divmod(int(shared.argmax()), len(shared))
            places[place] = expert
            shared[place, :] = shared[:, expert] = -1
        placed[layer] = a[layer][..., places]
    return placed


def differing_routes(a: torch.Tensor | None, b: torch.Tensor | None, kept: torch.Tensor) -> float | None:
    """The part of the routes of kept tokens that two models do not share, wherever experts are; `None` without."""
    if a is None or b is None or a.shape != b.shape:
        return None
    differing = (in_places_of(a, b, kept) != b)[:, kept].any(dim=-1)
    return float(differing.double().mean()) if differing.numel() else 0.0


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that its class says are its routers, layer after layer."""
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


@contextmanager
def on_routes(model: nn.Module, routes: torch.Tensor, kept: torch.Tensor) -> Iterator[list[float]]:
    """
    Send the tokens of a batch to these experts, with the weights that a model's own routers give them.

    Yields:
        `list[float]`: for each layer, as it is computed, by how much the logit of an expert that a kept token goes to
        is below that of one that its router would have chosen in its place, at most, as a part of the largest logit.
    """
    margins: list[float] = []

    def hold(chosen: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, indices = output  # [N, E], [N, k], [N, k], as all of the library's have it
            held = chosen.to(logits.device).double().topk(indices.shape[-1], dim=-1).indices
            gaps = logits.topk(indices.shape[-1], dim=-1).values[:, -1] - logits.gather(1, held).amin(dim=-1)
            margins.append(float(gaps[kept.flatten().to(gaps.device)].max() / logits.abs().max()))
            probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            shares, chosen_itself = probabilities.gather(1, held), probabilities.gather(1, indices)
            # Divided by their sum, if those of the router's own choice are.
            divided = chosen_itself / chosen_itself.sum(dim=-1, keepdim=True)
            if (divided - weights).abs().max() < (chosen_itself - weights).abs().max():
                shares = shares / shares.sum(dim=-1, keepdim=True)
            return logits, shares.to(weights.dtype), held

        return hook

    routers = zip(routers_of(model), routes.flatten(1, 2), strict=True)
    hooks = [router.register_forward_hook(hold(chosen)) for router, chosen in routers]
    try:
        yield margins
    finally:
        for hook in hooks:
            hook.remove()
