"""Persimmon: heads of queries and keys with LayerNorms that all of them share, of which part is turned."""

from transformers import PersimmonConfig, PersimmonForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .gpt_neox import GPT_NEOX, OTHER_HEADS, head_dim, rotation
from .llama import BIASES, IN_PART, UNGATED, heads_share_stream, in_part, kin_config, kin_target
from .maps import NORM_BIASES, Architecture, Family, only
from .phi import HEAD_NORMS
from .qwen3 import SHARED_IF_ANY, with_head_gains


_P = "model.layers.{i}"
_ATTENTION = {"source": f"{_P}.self_attn.query_key_value", "norm": f"{_P}.input_layernorm", "bias": None}

PERSIMMON = GPT_NEOX.varied(
    "Persimmon",
    {
        "embed_tokens": {"source": "model.embed_tokens"},
        "q_proj": _ATTENTION,
        "k_proj": _ATTENTION,
        "v_proj": _ATTENTION,
        "o_proj": {"source": f"{_P}.self_attn.dense"},
        "up_proj": {"source": f"{_P}.mlp.dense_h_to_4h", "norm": f"{_P}.post_attention_layernorm"},
        "down_proj": {"source": f"{_P}.mlp.dense_4h_to_h"},
        "project_out": {"norm": "model.final_layernorm"},
    },
    prefix="model.",
    fields={ours: theirs for ours, theirs in GPT_NEOX.fields.items() if ours != "use_parallel_residual"},
    final_norm="model.final_layernorm",
    embedding="model.embed_tokens",
    # Frequencies, which checkpoints of older releases stored.
    harmless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    options=HEAD_NORMS,
    former={},
)


def variant(config: PersimmonConfig) -> Family:
    """The weight map of a Persimmon, whose heads may be without norms."""
    norms = f"{_P}.self_attn.{{of}}_layernorm"
    return with_head_gains(PERSIMMON, norms, mean=True) if config.qk_layernorm else PERSIMMON


def rigpt_config(config: PersimmonConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Persimmon; see [`kin_config`]."""
    return kin_config(
        PERSIMMON,
        config,
        **NORM_BIASES,
        attention_output_bias=True,
        embedding_size=config.hidden_size,
        head_dim=head_dim(config),
        gated_mlp=False,
        rope_parameters=rotation(config),
        qk_norm_gain="vector" if config.qk_layernorm else None,
    )


REFUSED = OTHER_HEADS | only(
    "hidden_dropout",
    (0.0,),
    "it drops what the MLP writes and nothing of attention, and RiGPT has one probability for both",
    "Set it to 0.0 in the source's configuration, which changes nothing but training",
)
ARCHITECTURES = {"persimmon": Architecture("PersimmonForCausalLM", PERSIMMON, rigpt_config, REFUSED, variant)}
TARGETS = {
    "persimmon": kin_target(
        PersimmonForCausalLM,
        PERSIMMON,
        "rotary positions with fixed frequencies, LayerNorms, an ungated MLP, as many key-value heads as heads and "
        "`head_dim = hidden_size / num_attention_heads`",
        IN_PART
        | UNGATED
        | BIASES
        | SHARED_IF_ANY
        | {
            "num_key_value_heads": lambda config: config.num_key_value_heads == config.num_attention_heads,
            "head_dim": heads_share_stream,
        },
        variant=variant,
        rope_parameters=in_part,
    )
}
