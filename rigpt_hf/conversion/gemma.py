"""Gemma (the first): Llama's weight map, gains stored as their difference from 1, and embeddings times `sqrt(d)`."""

from transformers import GemmaConfig

from ..configuration_rigpt import RiGPTConfig
from .llama import ATTENTION_BIASES, LLAMA, PARTIAL, kin_config
from .maps import Architecture, only


def embedding_scale(config: GemmaConfig, layer: int) -> float:
    """The factor of embeddings on the way into the residual stream."""
    return config.hidden_size**0.5


# Rounded when a model is made, to 55.5 instead of 55.426 in 16 bits, whatever dtype the model has later.
_SCALED = {"scale": embedding_scale, "buffer": "model.embed_tokens.embed_scale"}

GEMMA = LLAMA.varied(
    "Gemma", {"embed_tokens": _SCALED, "project_in": _SCALED}, gain_offset=1.0, options=ATTENTION_BIASES
)


def rigpt_config(config: GemmaConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Gemma; see [`kin_config`]."""
    return kin_config(GEMMA, config)


REFUSED = only(
    "use_bidirectional_attention",
    (None, False),
    "these layers see what comes after them, and RiGPT's do not",
    "Convert a Gemma that is a language model",
)
ARCHITECTURES = {"gemma": Architecture("GemmaForCausalLM", GEMMA, rigpt_config, PARTIAL | REFUSED)}
