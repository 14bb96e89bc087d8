"""StableLM: Llama's weight map with LayerNorms, part of every head turned, its blocks in turn or side by side."""

from transformers import StableLmConfig, StableLmForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .dropout import vector_dropout
from .gpt_neox import OTHER_HEADS, head_dim, rotation
from .llama import IN_PART, UNBIASED, heads_share_stream, in_part, kin_config, kin_target
from .maps import NORM_BIASES, Architecture, Family, same
from .qwen3 import OWN_IF_ANY, with_head_gains


_NO_BIAS = {"bias": lambda config: False}

STABLELM = UNBIASED.varied(
    "StableLM",
    {
        "q_proj": {"bias": lambda config: config.use_qkv_bias},
        "k_proj": {"bias": lambda config: config.use_qkv_bias},
        "v_proj": {"bias": lambda config: config.use_qkv_bias},
        "gate_proj": _NO_BIAS,
        "up_proj": _NO_BIAS,
        "down_proj": _NO_BIAS,
        # The last norm has a bias, and the head has none that could take it over.
        "lm_head": {"norm": None},
    },
    fields={**UNBIASED.fields, "rms_norm_eps": "layer_norm_eps"},
    centred=True,
    norm_bias=True,
    options=same("use_parallel_residual") | {"qk_norm": "qk_layernorm"},
)
_ONE_NORM = {"norm": "model.layers.{i}.input_layernorm"}


def variant(config: StableLmConfig) -> Family:
    """
    The weight map of a StableLM: its MLP has a norm of its own unless it reads what attention reads, and every head of
    queries and keys may have one.
    """
    one = {"gate_proj": _ONE_NORM, "up_proj": _ONE_NORM} if config.use_parallel_residual else {}
    family = STABLELM.varied(STABLELM.name, one)
    norms = "model.layers.{i}.self_attn.{of}_layernorm.norms.{head}"
    return with_head_gains(family, norms, mean=True) if config.qk_layernorm else family


def rigpt_config(config: StableLmConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a StableLM; see [`kin_config`]."""
    (residual,) = vector_dropout({"hidden_dropout": config.hidden_dropout}, dropout)
    return kin_config(
        STABLELM,
        config,
        **NORM_BIASES,
        embedding_size=config.hidden_size,
        head_dim=head_dim(config),
        rope_parameters=rotation(config),
        residual_dropout=residual,
        qk_norm_gain="vector_per_head" if config.qk_layernorm else None,
    )


ARCHITECTURES = {"stablelm": Architecture("StableLmForCausalLM", STABLELM, rigpt_config, OTHER_HEADS, variant)}
TARGETS = {
    "stablelm": kin_target(
        StableLmForCausalLM,
        STABLELM,
        "rotary positions with fixed frequencies, LayerNorms, a gated MLP and "
        "`head_dim = hidden_size / num_attention_heads`",
        IN_PART | {"attention_bias": None, "mlp_bias": None, "head_dim": heads_share_stream} | OWN_IF_ANY,
        dropouts=("hidden_dropout",),
        variant=variant,
        rope_parameters=in_part,
    )
}
