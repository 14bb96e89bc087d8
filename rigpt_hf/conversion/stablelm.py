"""StableLM with sequential residuals: Llama's weight map with LayerNorms, part of every head turned."""

from transformers import StableLmConfig

from ..configuration_rigpt import RiGPTConfig
from .dropout import vector_dropout
from .llama import UNBIASED, kin_config
from .maps import Architecture, only


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
)


def rigpt_config(config: StableLmConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a StableLM; see [`kin_config`]."""
    (residual,) = vector_dropout({"hidden_dropout": config.hidden_dropout}, dropout)
    return kin_config(
        STABLELM,
        config,
        embedding_size=config.hidden_size,
        # Its attention alone among these does not read the field of this name.
        head_dim=config.hidden_size // config.num_attention_heads,
        output_bias=True,
        # LayerNorms in front have biases.
        attention_bias=True,
        mlp_bias=True,
        residual_dropout=residual,
    )


REFUSED = {
    **only(
        "use_parallel_residual",
        (False,),
        "attention and MLP read the same stream, and RiGPT's MLP reads what attention wrote",
        "Convert a StableLM without it",
    ),
    **only(
        "qk_layernorm",
        (False,),
        "every head of queries and keys has a norm with gains of its own, which fold into no weight",
        "Convert a StableLM without it",
    ),
}
ARCHITECTURES = {"stablelm": Architecture("StableLmForCausalLM", STABLELM, rigpt_config, REFUSED)}
