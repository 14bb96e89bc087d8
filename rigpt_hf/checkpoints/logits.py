"""The logits of a model on stated inputs, as certificates compare them; kept after the model is gone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..status import doing
from .precision import in_own_precision
from .routes import Routing, differing_routes, on_routes, recorded_routes
from .weights import weights_sha256


# Positions of a row of random inputs at most, and in a row of which there are two.
MOST_POSITIONS, SHORT = 1024, 64
# What configurations call the longest sequence, and what it is where one has no word for it, as BLOOM's has not.
LENGTHS, UNSAID = ("max_position_embeddings", "max_seq_len", "seq_length"), 2048


@dataclass(frozen=True)
class LogitsSnapshot:
    """A model's logits on some inputs, kept after the model is gone."""

    logits: torch.Tensor  # [batch, seq, vocab], on the CPU, in the model's dtype
    dtype: torch.dtype
    weights_sha256: str = ""
    # Of models with experts, where tokens go in each layer that has them.
    routes: tuple[Routing, ...] = ()
    # And the logits where tokens went to those of another model, with how far its routers were from theirs.
    on_same_routes: torch.Tensor | None = None
    router_error: float | None = None

    def of_tokens(self, count: int) -> "LogitsSnapshot":
        """The logits of the first tokens of the vocabulary alone."""
        held = self.on_same_routes
        return replace(
            self, logits=self.logits[..., :count], on_same_routes=None if held is None else held[..., :count]
        )


def longest_of(config: Any) -> int:
    """The longest sequence that a model of a configuration, stock or ours, is made for."""
    return next((length for name in LENGTHS if (length := getattr(config, name, None))), UNSAID)


def random_input_ids(
    vocab_size: int, max_length: int, batch: int | None = None, length: int | None = None, seed: int = 0
) -> torch.Tensor:
    """
    Token ids `[batch, min(length, max_length)]` drawn uniformly: the certificate's inputs if none are given. By
    default they fill all positions, up to `MOST_POSITIONS`; short rows are two.
    """
    length = min(MOST_POSITIONS if length is None else length, max_length)
    batch = (1 if length > SHORT else 2) if batch is None else batch
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


@torch.no_grad()
@doing("Computing logits")
def record_logits(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    hashed: bool = True,
    like: LogitsSnapshot | None = None,
) -> LogitsSnapshot:
    """
    The logits of a model in evaluation mode; its mode is restored afterwards.

    Args:
        model (`PreTrainedModel`): what computes them.
        input_ids, attention_mask: as in [`certify`].
        hashed (`bool`, defaults to `True`): hash its weights too, as a certificate of it needs; a source needs none.
        like (`LogitsSnapshot`, *optional*): of the model that it will be compared with. If that one sends tokens to
            other experts, the logits are recorded once more on its routes.
    """
    training = model.training
    model.eval()
    mask = None if attention_mask is None else attention_mask.to(model.device)
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask, "use_cache": False}
    kept = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).cpu().bool().flatten()
    held, error = None, None
    try:
        with in_own_precision(model), layers_counted(model):
            with recorded_routes(model) as routes:
                logits = model(**inputs).logits.cpu()
            if like is not None and differing_routes(like.routes, routes, kept):
                with on_routes(model, like.routes, kept) as errors:
                    held = model(**inputs).logits.cpu()
                error = max(errors)
    finally:
        model.train(training)
    digest = weights_sha256(model) if hashed else ""
    return LogitsSnapshot(logits, model.dtype, digest, tuple(routes), held, error)


@contextmanager
def layers_counted(model: Any) -> Iterator[tqdm]:
    """Inside, a bar on a terminal counts the layers that have run, once they have taken two seconds."""
    layers = max((each for each in model.modules() if isinstance(each, nn.ModuleList)), key=len, default=())
    with tqdm(total=len(layers), desc="Computing logits", unit="layer", delay=2, disable=None) as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]
        try:
            yield bar
        finally:
            for hook in hooks:
                hook.remove()
