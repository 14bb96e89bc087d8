"""The recipes that `compare.py` trains; equal in data and budget, each with the learning rates worth a try."""

from dataclasses import dataclass
from typing import Any

from .options import ModelOptions, OptimizerOptions


@dataclass(frozen=True)
class Candidate:
    """A model and how it is trained; the learning rate is set by the sweep."""

    model: ModelOptions
    optimizer: OptimizerOptions


WIDTH, LAYERS, HEADS = 192, 6, 6
# Windows hold one token more than are predicted.
LENGTH = 257
RIGPT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "embedding_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_act": "relu2",
    "qk_norm": True,
    "max_position_embeddings": LENGTH,
}
STOCK = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
ADAMW_RATES, RATES_POLAR = (1e-3, 3e-3, 6e-3), (5e-3, 1e-2, 2e-2)


def rigpt(optimizer: str = "equivariant", **options: Any) -> Candidate:
    """A RiGPT with some options changed."""
    return Candidate(ModelOptions(config=RIGPT | options), OptimizerOptions(name=optimizer))  # type: ignore[arg-type]


CANDIDATES = {
    "stock-gpt2": Candidate(ModelOptions("stock-gpt2", STOCK), OptimizerOptions(name="adamw")),
    "rigpt-adamw": rigpt("adamw"),
    "rigpt": rigpt(),
    "rigpt-untied": rigpt(tie_word_embeddings=False),
    "rigpt-no-qk-norm": rigpt(qk_norm=False),
    "rigpt-gelu": rigpt(hidden_act="gelu_pytorch_tanh"),
    "rigpt-learned-positions": rigpt(position_embedding_type="learned"),
    "rigpt-squared-distance": rigpt(attention_score="squared_distance", qk_norm=False),
    "rigpt-distance": rigpt(attention_score="distance"),
    "rigpt-no-projections": rigpt(embedding_size=None),
}
RATES = {name: ADAMW_RATES if "adamw" in name or "stock" in name else RATES_POLAR for name in CANDIDATES}
