"""Cohere (Command R): attention and MLP read one norm side by side, neighbours turn together, logits have a scale."""

from transformers import Cohere2Config, CohereConfig

from ..configuration_rigpt import RiGPTConfig
from ..layers_rigpt import SLIDING
from .ernie4_5 import interleaved
from .llama import ATTENTION_BIASES, LLAMA, PARTIAL, kin_config, sight
from .maps import Architecture, Family
from .qwen3 import with_head_gains


def logit_scale(config: CohereConfig, layer: int) -> float:
    """The factor of logits."""
    return config.logit_scale


_ONE_NORM = {"norm": "model.layers.{i}.input_layernorm"}

COHERE = LLAMA.varied(
    "Cohere",
    {
        "q_proj": {"rows": interleaved},
        "k_proj": {"rows": interleaved},
        "gate_proj": _ONE_NORM,
        "up_proj": _ONE_NORM,
        "project_out": {"scale": logit_scale},
        "lm_head": {"scale": logit_scale},
    },
    fields={**LLAMA.fields, "rms_norm_eps": "layer_norm_eps"},
    centred=True,
    options=ATTENTION_BIASES | {"qk_norm": "use_qk_norm"},
)

COHERE2 = COHERE.varied("Cohere 2", options=ATTENTION_BIASES)


def variant(config: CohereConfig) -> Family:
    """The weight map of a Cohere, every head of which may have a norm of its own."""
    return with_head_gains(COHERE, rows=interleaved, mean=True) if config.use_qk_norm else COHERE


def rigpt_config(config: CohereConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Cohere; see [`kin_config`]."""
    gain = "vector_per_head" if config.use_qk_norm else None
    return kin_config(COHERE, config, use_parallel_residual=True, qk_norm_gain=gain)


def cohere2_config(config: Cohere2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Cohere 2, where positions turn those layers alone that look through a window."""
    turned = [int(kind == SLIDING) for kind in config.layer_types[: config.num_hidden_layers]]
    return kin_config(
        COHERE2,
        config,
        use_parallel_residual=True,
        no_rope_layers=None if all(turned) else turned,
        **sight(config, True),
    )


ARCHITECTURES = {
    "cohere": Architecture("CohereForCausalLM", COHERE, rigpt_config, PARTIAL, variant),
    "cohere2": Architecture("Cohere2ForCausalLM", COHERE2, cohere2_config, PARTIAL),
}
