"""Phi-1, Phi-1.5 and Phi-2: attention and MLP read one norm side by side, and the head has a bias."""

from transformers import PhiConfig, PhiForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .dropout import vector_dropout
from .llama import BIASES, IN_PART, UNBIASED, UNGATED, Expressed, in_part, kin_config, kin_target
from .maps import NORM_BIASES, Architecture, Family
from .qwen3 import SHARED_IF_ANY, with_head_gains


_P = "model.layers.{i}"
_ONE_NORM = {"norm": f"{_P}.input_layernorm"}
# Norms of heads that have biases.
HEAD_NORMS = dict.fromkeys(("qk_norm", "qk_norm_bias"), "qk_layernorm")

PHI = UNBIASED.varied(
    "Phi",
    {
        "o_proj": {"source": f"{_P}.self_attn.dense"},
        "gate_proj": None,
        "up_proj": _ONE_NORM | {"source": f"{_P}.mlp.fc1"},
        "down_proj": {"source": f"{_P}.mlp.fc2"},
        "project_out": {"norm": "model.final_layernorm"},
        # The last norm has a bias, and the head's is a dimension of its own.
        "lm_head": {"norm": None},
    },
    fields={**UNBIASED.fields, "rms_norm_eps": "layer_norm_eps"},
    final_norm="model.final_layernorm",
    centred=True,
    norm_bias=True,
    head_bias=True,
    options=HEAD_NORMS,
)


def variant(config: PhiConfig) -> Family:
    """The weight map of a Phi, whose heads may have norms, one for all."""
    return with_head_gains(PHI, f"{_P}.self_attn.{{of}}_layernorm", mean=True) if config.qk_layernorm else PHI


def rigpt_config(config: PhiConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Phi; see [`kin_config`]."""
    residual, embedding = vector_dropout({"resid_pdrop": config.resid_pdrop, "embd_pdrop": config.embd_pdrop}, dropout)
    return kin_config(
        PHI,
        config,
        **NORM_BIASES,
        attention_output_bias=True,
        embedding_size=config.hidden_size + 1,
        gated_mlp=False,
        use_parallel_residual=True,
        residual_dropout=residual,
        embedding_dropout=embedding,
        qk_norm_gain="vector" if config.qk_layernorm else None,
    )


ARCHITECTURES = {"phi": Architecture("PhiForCausalLM", PHI, rigpt_config, variant=variant)}
_PARALLEL: Expressed = {"use_parallel_residual": lambda config: config.use_parallel_residual}
TARGETS = {
    "phi": kin_target(
        PhiForCausalLM,
        PHI,
        "rotary positions with fixed frequencies, LayerNorms, attention and an ungated MLP side by side",
        IN_PART | UNGATED | BIASES | _PARALLEL | SHARED_IF_ANY,
        dropouts=("resid_pdrop", "embd_pdrop"),
        variant=variant,
        rope_parameters=in_part,
    )
}
