"""The recipes that `compare.py` trains; equal in data and budget, each with the learning rates worth a try."""

from dataclasses import dataclass
from typing import Any

from rigpt_hf.training.options import ModelOptions, OptimizerOptions

from . import affine_norm, modern  # noqa: F401  which add their kinds of models


@dataclass(frozen=True)
class Candidate:
    """A model and how it is trained; the learning rate is set by the sweep, over `rates`."""

    model: ModelOptions
    optimizer: OptimizerOptions
    rates: tuple[float, ...]


WIDTH, LAYERS = 192, 6
# Stock GPT-2 is better with six heads than with three, the others with three.
STOCK_HEADS, HEADS = 6, 3
# Windows hold one token more than are predicted.
LENGTH = 257
ADAMW_RATES, POLAR_RATES = (1.5e-3, 3e-3, 6e-3), (6e-3, 1.2e-2, 2.4e-2)
# In runs as short as these a shorter memory is better than the usual 0.95.
MOMENTUM = 0.75
# Twenty steps: what makes the weights of a high rate usable before it falls.
AVERAGE = 0.95
# Rates of tables relative to those of matrices: of what a token meets seldom, much must be learned at once.
TABLES = {"embed_tokens": 4.0}
VALUES = {"value_embedding": 10.0}
# As public recipes have them: the table of tokens starts at length one per coordinate and moves by 0.3.
MODERN = {"embed_tokens": 30.0, "value_embedding": 10.0}
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
}
PARTS: dict[str, Any] = {"hidden_act": "relu2", "qk_norm": True, "embedding_norm": True}
# One table and two projections: as many parameters as stock GPT-2 has.
TIED = SMALL | PARTS | {"embedding_size": WIDTH}
# A little under 6.6 million parameters.
RECIPE = SMALL | PARTS | {"tie_word_embeddings": False, "value_embedding_period": 2}


def stock(width: int, heads: int, average: float | None = None) -> Candidate:
    """A stock GPT-2 of six layers."""
    config = {"n_embd": width, "n_layer": LAYERS, "n_head": heads, "n_positions": LENGTH}
    return Candidate(
        ModelOptions("stock-gpt2", config), OptimizerOptions(optim="adamw", ema_decay=average), ADAMW_RATES
    )


def rigpt(
    base: dict[str, Any],
    optimizer: str = "equivariant",
    average: float | None = AVERAGE,
    training: dict[str, Any] | None = None,
    kind: str = "rigpt",
    **options: Any,
) -> Candidate:
    """A RiGPT with some options changed, or one with gains, and those of the optimizer in `training`."""
    config = base | options
    multipliers = {} if config.get("tie_word_embeddings", True) else TABLES
    multipliers = multipliers | (VALUES if config.get("value_embedding_period") else {})
    settings = OptimizerOptions(
        optim=optimizer,
        momentum=MOMENTUM,
        ema_decay=average,
        lr_multipliers={} if optimizer == "adamw" else multipliers,
        **(training or {}),
    )
    rates = ADAMW_RATES if optimizer == "adamw" else POLAR_RATES
    return Candidate(ModelOptions(kind, config), settings, rates)


CANDIDATES = {
    "stock-gpt2": stock(WIDTH, STOCK_HEADS),
    "stock-gpt2-averaged": stock(WIDTH, STOCK_HEADS, AVERAGE),
    "stock-gpt2-wide": stock(272, 8),
    "modern": Candidate(
        ModelOptions("modern-gpt", SMALL), OptimizerOptions(optim="muon", lr_multipliers=MODERN), POLAR_RATES
    ),
    # The same with what RiGPT's runs gained from: a shorter memory and the moving average.
    "modern-tuned": Candidate(
        ModelOptions("modern-gpt", SMALL),
        OptimizerOptions(optim="muon", momentum=MOMENTUM, ema_decay=AVERAGE, lr_multipliers=MODERN),
        POLAR_RATES,
    ),
    "rigpt": rigpt(TIED),
    "rigpt-adamw": rigpt(TIED, "adamw"),
    "rigpt-no-embedding-norm": rigpt(TIED, embedding_norm=False),
    "rigpt-rmsnorm": rigpt(TIED, kind="affine-norm-rigpt", stream_norm="rmsnorm"),
    "rigpt-layernorm": rigpt(TIED, kind="affine-norm-rigpt", stream_norm="layernorm"),
    "rigpt-values": rigpt(TIED, value_embedding_period=2),
    # The cost of four bits may depend on how training ends.
    "rigpt-no-decay": rigpt(TIED, training={"weight_decay": 0.0}),
    "rigpt-strong-decay": rigpt(TIED, training={"weight_decay": 0.4}),
    "rigpt-long-tail": rigpt(TIED, training={"decay_fraction": 0.9}),
    "recipe": rigpt(RECIPE),
    # The recipe without one of its parts.
    "recipe-tied": rigpt(RECIPE, tie_word_embeddings=True),
    "recipe-no-embedding-norm": rigpt(RECIPE, embedding_norm=False),
    "recipe-no-values": rigpt(RECIPE, value_embedding_period=None),
    "recipe-no-qk-norm": rigpt(RECIPE, qk_norm=False),
    "recipe-no-average": rigpt(RECIPE, average=None),
    # Or with another.
    "recipe-projections": rigpt(RECIPE, embedding_size=WIDTH),
    "recipe-gelu": rigpt(RECIPE, hidden_act="gelu_pytorch_tanh"),
    "recipe-learned-positions": rigpt(RECIPE, position_embedding_type="learned"),
    "recipe-squared-distance": rigpt(RECIPE, attention_score="squared_distance"),
    "recipe-distance": rigpt(RECIPE, attention_score="distance"),
    "recipe-adamw": rigpt(RECIPE, "adamw"),
    "recipe-muon": rigpt(RECIPE, "muon"),
}
