"""Routes of tokens to experts: which those are, how far two models share them, and one model on those of another.

Shapes: `N` tokens of a batch, `E` experts, `k` experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class Routing(NamedTuple):
    """The output of a router for a batch, on the CPU."""

    logits: torch.Tensor  # [N, E]
    chosen: torch.Tensor  # [N, k]


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that its class says are its routers, layer after layer."""
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


@contextmanager
def hooked(model: nn.Module, hooks: Sequence[Any]) -> Iterator[None]:
    """One forward hook on each router while it lasts."""
    handles = [router.register_forward_hook(one) for router, one in zip(routers_of(model), hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_routes(model: nn.Module) -> Iterator[list[Routing]]:
    """
    Record where the model sends tokens; its routers say so themselves, as of equal logits no other can.

    Yields:
        `list[Routing]`: of each layer that has experts, as it is computed.
    """
    routes: list[Routing] = []

    def record(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _, chosen = output  # [N, E], [N, k], [N, k], as all of the library's have it
        routes.append(Routing(logits.cpu(), chosen.cpu()))

    with hooked(model, [record] * len(routers_of(model))):
        yield routes


def comparable(a: Sequence[Routing], b: Sequence[Routing]) -> bool:
    """Whether two models have experts, in as many layers, as many, and send each token to as many."""
    shapes = [[(one.logits.shape, one.chosen.shape) for one in routes] for routes in (a, b)]
    return bool(shapes[0]) and shapes[0] == shapes[1]


def centred(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The logits of kept tokens less their mean over experts, which neither weights nor choices depend on: float64."""
    logits = logits[kept].double()
    return logits - logits.mean(dim=-1, keepdim=True)


def places_in(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """
    For each expert of a router its place in another, which may have them in another order.

    Those with the nearest centred logits `[N, E]` are the same, nearest of all first.
    """
    distances = torch.cdist(a.T, b.T, compute_mode="donot_use_mm_for_euclid_dist")
    places = torch.arange(len(distances))
    for _ in range(len(places)):
        expert, place = divmod(int(distances.argmin()), len(places))
        places[expert] = place
        distances[expert, :] = distances[:, place] = torch.inf
    return places


def differing_routes(a: Sequence[Routing], b: Sequence[Routing], kept: torch.Tensor) -> float | None:
    """The part of routes of kept tokens `[N]` that two models do not share, wherever experts are; `None` without."""
    if not comparable(a, b):
        return None
    parts = []
    for ours, theirs in zip(a, b, strict=True):
        places = places_in(centred(theirs.logits, kept), centred(ours.logits, kept))
        differing = places[ours.chosen[kept]].sort(dim=-1).values != theirs.chosen[kept].sort(dim=-1).values
        parts.append(differing.any(dim=-1).double().mean())
    return float(torch.stack(parts).mean())


@contextmanager
def on_routes(model: nn.Module, routes: Sequence[Routing], kept: torch.Tensor) -> Iterator[list[float]]:
    """
    Send the tokens of a batch where another model does, with the weights that a model's own routers give them.

    Yields:
        `list[float]`: for each layer, as it is computed, how far the centred logits of its router are from the other
        model's at kept tokens: the root mean square of differences, as a part of that of the logits.
    """
    errors: list[float] = []

    def hold(routing: Routing) -> Any:
        def hook(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, indices = output
            ours, theirs = centred(logits.cpu(), kept), centred(routing.logits, kept)
            places = places_in(ours, theirs)
            size = max(float(ours.norm()), float(theirs.norm()))
            errors.append(float((ours[:, places] - theirs).norm()) / size if size else 0.0)
            held = places[routing.chosen].to(logits.device)
            probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            shares, chosen_itself = probabilities.gather(1, held), probabilities.gather(1, indices)
            # Divided by their sum, if those of the router's own choice are.
            divided = chosen_itself / chosen_itself.sum(dim=-1, keepdim=True)
            if (divided - weights).abs().max() < (chosen_itself - weights).abs().max():
                shares = shares / shares.sum(dim=-1, keepdim=True)
            return logits, shares.to(weights.dtype), held

        return hook

    with hooked(model, [hold(routing) for routing in routes]):
        yield errors
