"""GLM-4: Llama's weight map, neighbours in part of every head turn together; the later one has norms behind blocks."""

from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .gemma import OUTPUT_NORMS, with_output_norms
from .llama import IN_PART, UNBIASED, Expressed, head_dim, in_part, kin_config, kin_target, turns_whole_heads
from .maps import Architecture, same
from .phi3 import half


def interleaved(config: GlmConfig) -> Rows:
    """The rows of each head, of which the first are pairs of neighbours."""
    size, rope = head_dim(config), config.rope_parameters
    turned = size if turns_whole_heads(rope) else int(size * rope["partial_rotary_factor"])
    return Rows(0, size, size, interleaved=turned)


_GATE_UP = "model.layers.{i}.mlp.gate_up_proj"

GLM = UNBIASED.varied(
    "GLM",
    {
        "q_proj": {"rows": interleaved},
        "k_proj": {"rows": interleaved},
        "gate_proj": {"source": _GATE_UP, "rows": half(0)},
        "up_proj": {"source": _GATE_UP, "rows": half(1)},
    },
    options=same("attention_bias"),
)
GLM4 = with_output_norms(GLM.varied("GLM-4"), "post_self_attn_layernorm", "post_mlp_layernorm")


def rigpt_config(config: GlmConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a GLM; see [`kin_config`]."""
    return kin_config(GLM, config)


def glm4_config(config: Glm4Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a GLM-4 of the later release (0414)."""
    return kin_config(GLM4, config, post_norm=True)


ARCHITECTURES = {
    "glm": Architecture("GlmForCausalLM", GLM, rigpt_config),
    "glm4": Architecture("Glm4ForCausalLM", GLM4, glm4_config),
}
_BIASES: Expressed = {"attention_bias": None}
_SUMMARY = "rotary positions with fixed frequencies, a gated MLP, biases on q, k and v alone, no q/k normalisation"
TARGETS = {
    "glm": kin_target(GlmForCausalLM, GLM, _SUMMARY, IN_PART | _BIASES, rope_parameters=in_part),
    "glm4": kin_target(
        Glm4ForCausalLM,
        GLM4,
        f"{_SUMMARY}, norms in front of blocks and behind them",
        IN_PART | _BIASES | OUTPUT_NORMS,
        rope_parameters=in_part,
    ),
}
