"""Qwen3: Llama's weight map, and norms of queries and keys with a gain for each dimension of a head."""

from dataclasses import replace

from transformers import Qwen3Config, Qwen3ForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import _EXPRESSES, ATTENTION_BIASES, LLAMA, PARTIAL, _common, kin_config, sight
from .maps import Architecture, Rule, Target


_NORMS = {of: f"model.layers.{{i}}.self_attn.{of}_norm" for of in "qk"}
_BIASED = LLAMA.varied(
    "Qwen3", {f"{of}_proj": {"behind": norm} for of, norm in _NORMS.items()}, options=ATTENTION_BIASES
)
QWEN3 = replace(_BIASED, rules=(*_BIASED.rules, *(Rule(norm, norm, gain=True) for norm in _NORMS.values())))


def rigpt_config(config: Qwen3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Qwen3; see [`kin_config`]."""
    return kin_config(QWEN3, config, qk_norm=True, qk_norm_gain="vector", **sight(config, True))


def qwen3_config(config: RiGPTConfig) -> Qwen3Config:
    """The configuration of the Qwen3 equal to a RiGPT's, but for `tie_word_embeddings`, which the weights decide."""
    biased = config.attention_bias or config.attention_output_bias
    return Qwen3Config(**_common(config, "Qwen3"), attention_bias=biased)


ARCHITECTURES = {"qwen3": Architecture("Qwen3ForCausalLM", QWEN3, rigpt_config, PARTIAL)}
TARGETS = {
    "qwen3": Target(
        name="Qwen3",
        model_class=Qwen3ForCausalLM,
        family=QWEN3,
        expresses=_EXPRESSES
        | {"attention_output_bias": None, "qk_norm": lambda config: config.qk_norm, "qk_norm_gain": None},
        stock_config=qwen3_config,
        summary="fixed rotary positions for whole heads, q/k normalisation, and a gated MLP without biases",
        alternative="Try `target='llama'`.",
    )
}
