"""Granite (dense): Llama's weight map, and four constants of the configuration that fold into it."""

from transformers import GraniteConfig, GraniteForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import LLAMA, PARTIAL, ROTARY, head_dim, kin_config, kin_target
from .maps import Architecture


def query_scale(config: GraniteConfig, layer: int) -> float:
    """Granite's scores in units of `q·k / sqrt(head_dim)`."""
    return config.attention_multiplier * head_dim(config) ** 0.5


def embedding_scale(config: GraniteConfig, layer: int) -> float:
    """The factor of embeddings on the way into the residual stream."""
    return config.embedding_multiplier


def residual_scale(config: GraniteConfig, layer: int) -> float:
    """The factor of attention and MLP before they are added."""
    return config.residual_multiplier


def logit_scale(config: GraniteConfig, layer: int) -> float:
    """The factor of logits."""
    return 1.0 / config.logits_scaling


GRANITE = LLAMA.varied(
    "Granite",
    {
        "embed_tokens": {"scale": embedding_scale},
        "project_in": {"scale": embedding_scale},
        "q_proj": {"scale": query_scale},
        "o_proj": {"scale": residual_scale},
        "down_proj": {"scale": residual_scale},
        "project_out": {"scale": logit_scale},
        "lm_head": {"scale": logit_scale},
    },
)


def rigpt_config(config: GraniteConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Granite; see [`kin_config`]."""
    return kin_config(GRANITE, config)


ARCHITECTURES = {"granite": Architecture("GraniteForCausalLM", GRANITE, rigpt_config, PARTIAL)}
TARGETS = {
    "granite": kin_target(
        GraniteForCausalLM,
        GRANITE,
        f"{ROTARY}, a gated MLP, no q/k normalisation",
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        attention_multiplier=lambda config: config.head_dim**-0.5,
    )
}
