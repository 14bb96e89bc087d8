"""The learners: stock GPT-2, RiGPT, and RiGPT that carries a symmetry of its data or sees it by augmentation."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.tokens import Representation, SymmetricTraining, TokenSymmetry, symmetry_error
from ..symmetry.tokens.filling import RESTING
from ..training.build import build_optimizer
from ..training.options import OptimizerOptions
from ..training.schedule import make_schedule


ADAMW_RATES, EQUIVARIANT_RATES = (1e-3, 3e-3, 1e-2), (5e-3, 1e-2, 2e-2)
# Of one with a symmetry each number moves many weights, the more the larger the group.
SYMMETRIC_RATES = (2e-3, 5e-3, 1e-2)
# Rows of token ids and labels, `[rows, length]`, of one step; several parts that may differ in length.
Parts = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Learner:
    """
    A model and how it is trained.

    Args:
        model: Its class.
        optim: Its optimizer.
        carries (`str`, *optional*): The symmetry that its weights have.
        kind, resting: How it is represented, as of [`Representation.choose`].
        sees (`str`, *optional*): The symmetry by which its data are relabelled at random.
        project_weights: Whether weights are projected after each step, as an optimizer needs that would leave it.
    """

    model: Literal["rigpt", "stock-gpt2"] = "rigpt"
    optim: Literal["equivariant", "adamw"] = "equivariant"
    carries: str | None = None
    kind: str = "irreducible"
    resting: float = RESTING
    sees: str | None = None
    project_weights: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to sweep."""
        if self.carries is not None and self.optim == "equivariant":
            return SYMMETRIC_RATES
        return EQUIVARIANT_RATES if self.optim == "equivariant" else ADAMW_RATES


@dataclass(frozen=True)
class Sizes:
    """The shape that all learners of an experiment have."""

    hidden_size: int
    layers: int
    heads: int
    positions: int


def make_model(learner: Learner, vocabulary: int, sizes: Sizes, seed: int) -> Any:
    """A learner with random weights."""
    torch.manual_seed(seed)
    if learner.model == "stock-gpt2":
        shape = {"n_embd": sizes.hidden_size, "n_layer": sizes.layers, "n_head": sizes.heads}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(vocab_size=vocabulary, n_positions=sizes.positions, **shape, **dropout, **ends)
        return GPT2LMHeadModel(config)
    return RiGPTForCausalLM(
        RiGPTConfig(
            vocab_size=vocabulary,
            hidden_size=sizes.hidden_size,
            embedding_size=sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=sizes.positions,
            position_embedding_type="learned",
            hidden_act="relu2",
            qk_norm=True,
        )
    )


class Relabelling:
    """
    Rows of tokens after elements of a symmetry that are drawn at random, one for each row.

    Args:
        symmetry (`TokenSymmetry`): Of at most 5,000 elements.
        seed (`int`): Of the draw.
    """

    def __init__(self, symmetry: TokenSymmetry, seed: int):
        elements = symmetry.group.elements
        self.elements = np.arange(symmetry.vocab_size)[None].repeat(len(elements), 0)
        self.elements[:, symmetry.points] = symmetry.points[elements]
        self.draw = np.random.default_rng(seed)

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(self.elements[self.draw.integers(len(self.elements), size=len(ids))])
        moved = chosen.gather(1, labels.clamp_min(0))
        return chosen.gather(1, ids), torch.where(labels < 0, labels, moved)


def train(
    learner: Learner,
    model: Any,
    batch: Callable[[int], Parts],
    *,
    steps: int,
    rate: float,
    seed: int,
    symmetries: Mapping[str, TokenSymmetry],
    on_step: Callable[[int, float], Any] = lambda step, loss: None,
    keeper: Any = None,
) -> Any:
    """
    Train a learner in place.

    Args:
        batch: The rows of a step, from 0.
        steps, rate, seed: Of the training; the rate rises for 40 steps and falls over the second half.
        symmetries: By name those that a learner may carry or see.
        on_step: Called with the number of steps done and the loss of the last, nats per token.
        keeper (*optional*): What keeps the symmetry of a model that is no RiGPT, with the methods of
            [`SymmetricTraining`] that are used here.

    Returns:
        The representation of the symmetry that the learner carries; the keeper if there is one; or `None`.
    """
    options = OptimizerOptions(optim=learner.optim, learning_rate=rate, warmup_steps=min(40, steps // 4))
    optimizer, schedule = build_optimizer(options, model), make_schedule(options, steps)
    representation = None
    if learner.carries is not None and keeper is None:
        representation = Representation.choose(
            model.config, symmetries[learner.carries], kind=learner.kind, resting=learner.resting
        )
    symmetric = keeper or SymmetricTraining(model, representation, learner.project_weights)
    symmetric.begin_(optimizer)
    relabel = None if learner.sees is None else Relabelling(symmetries[learner.sees], seed)
    model.train()
    for step in range(steps):
        parts = [relabel(*part) if relabel else part for part in batch(step)]
        count, total = sum(int((labels[:, 1:] >= 0).sum()) for _, labels in parts), 0.0
        for ids, labels in parts:
            loss = model(ids, labels=labels, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step) * group["multiplier"]
        symmetric.project_gradients_()
        nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        symmetric.end_step_()
        on_step(step + 1, total)
    model.eval()
    return keeper or representation


def answers(model: Any, parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, np.ndarray]:
    """
    The loss, nats per token of the answers, and for each row whether the model's own answer is the right one.

    A greedy answer is the right one exactly if each of its tokens is the likeliest after the right ones before it, so
    that one pass over the right answers says what generating would.
    """
    total, count, right = 0.0, 0, []
    with torch.no_grad():
        for ids, labels in parts:
            logits, asked = model(ids, use_cache=False).logits[:, :-1].double(), labels[:, 1:]
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten(), reduction="sum"))
            count += int((asked >= 0).sum())
            right.append(((logits.argmax(-1) == asked) | (asked < 0)).all(1).numpy())
    return total / max(count, 1), np.concatenate(right)


def sizes_of(model: Any, representation: Any) -> dict[str, int]:
    """How many parameters a model has, and how many numbers it may choose."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": total, "free_parameters": representation.free_parameters(model) if representation else total}


def symmetry_of(model: Any, symmetry: TokenSymmetry, representation: Any, ids: torch.Tensor) -> dict[str, float]:
    """How far a trained model is from a symmetry: as a function in nats, and its weights from those that carry it."""
    error = symmetry_error(model, symmetry, ids)
    found = {"symmetry_error_max": error.max, "symmetry_error_mean": error.mean}
    return found | ({"distance": representation.distance(model)} if representation else {})
