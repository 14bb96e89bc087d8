"""
MPT: the weight map, and what each option of `MptConfig` becomes.

Much of that configuration is for MosaicML's own code: Transformers' class has no biases, learns no positions, always
has linear biases of scores, and uses one probability of dropout for all.
"""

from collections.abc import Callable
from typing import Any

from transformers import MptConfig, MptForCausalLM
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from ..configuration_rigpt import RiGPTConfig
from .dropout import stock_dropouts, vector_dropout
from .llama import heads_share_stream
from .maps import Architecture, Family, Rows, Rule, Target, same


# Neurons per dimension of the stream, a constant of the library's class.
EXPANSION = 4


def slopes(config: MptConfig) -> list[float]:
    """The slopes by which the class multiplies positions, as float32 rounds them."""
    return (-build_mpt_alibi_tensor(config.n_heads, 2)[:, 0, 0]).tolist()


def query_scale(config: MptConfig, layer: int) -> float:
    """MPT's scores in units of `q·k / sqrt(head_dim)`, which fold into queries."""
    scale = config.attn_config.softmax_scale
    return 1.0 if scale is None else scale * (config.d_model // config.n_heads) ** 0.5


def third(index: int) -> Callable[[MptConfig], Rows]:
    """Queries, keys or values in the map that makes all three."""
    return lambda config: Rows(index * config.d_model, config.d_model, 3 * config.d_model)


_B, _L = "transformer.blocks.{i}", "model.layers.{i}"
_QKV, _NORM_1, _NORM_2 = f"{_B}.attn.Wqkv", f"{_B}.norm_1", f"{_B}.norm_2"

MPT = Family(
    name="MPT",
    prefix="transformer.",
    rules=(
        Rule("model.embed_tokens", "transformer.wte"),
        Rule("model.project_in"),
        Rule(f"{_L}.self_attn.alibi", values=slopes),
        Rule(f"{_L}.self_attn.q_proj", _QKV, _NORM_1, third(0), query_scale),
        Rule(f"{_L}.self_attn.k_proj", _QKV, _NORM_1, third(1)),
        Rule(f"{_L}.self_attn.v_proj", _QKV, _NORM_1, third(2)),
        Rule(f"{_L}.self_attn.o_proj", f"{_B}.attn.out_proj"),
        Rule(f"{_L}.mlp.up_proj", f"{_B}.ffn.up_proj", _NORM_2),
        Rule(f"{_L}.mlp.down_proj", f"{_B}.ffn.down_proj"),
        Rule("model.project_out", norm="transformer.norm_f"),
        Rule("lm_head", "lm_head"),
    ),
    fields=same("vocab_size", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
    | {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    final_norm="transformer.norm_f",
    head="lm_head",
    embedding="transformer.wte",
    centred=True,
    norm_bias=False,
    harmless=(),
)


def rigpt_config(config: MptConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to an MPT; see [`Architecture.result`]."""
    probability = config.attn_config.attn_pdrop
    (residual,) = vector_dropout({"attn_config.attn_pdrop": probability}, dropout)
    return RiGPTConfig(
        **MPT.rigpt_fields(config),
        embedding_size=config.d_model,
        intermediate_size=EXPANSION * config.d_model,
        hidden_act="gelu",
        position_embedding_type="alibi",
        attention_dropout=probability,
        residual_dropout=residual,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_config(config: RiGPTConfig) -> MptConfig:
    """The configuration of the MPT equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide."""
    stock_dropouts(config, MPT.name, ())  # its configuration takes whole numbers for its probabilities
    return MptConfig(**MPT.stock_fields(config))


def clipped(config: MptConfig) -> str | None:
    """Coordinates that are cut off."""
    if not (bound := config.attn_config.clip_qkv):
        return None
    return (
        f"`attn_config.clip_qkv={bound}` cannot be converted: it cuts off single coordinates of queries, keys and "
        "values, which prefers a basis. Set it to `None` in the source's configuration if nothing reaches it, and see "
        "by `rigpt verify` on your text whether that is so."
    )


def ignored(option: str, *honoured: Any) -> Callable[[MptConfig], str | None]:
    """A refusal of what the library's class does not do, whatever its configuration says."""

    def words(config: MptConfig) -> str | None:
        *parents, name = option.split(".")
        value = getattr(getattr(config, parents[0]) if parents else config, name)
        if value in honoured:
            return None
        return (
            f"`{option}={value}` cannot be converted: Transformers' own class computes as if it were {honoured[0]}. "
            f"Set it to {honoured[0]} in the source's configuration if that is the model you mean."
        )

    return words


REFUSED = {
    "attn_config.clip_qkv": clipped,
    "attn_config.qk_ln": ignored("attn_config.qk_ln", False),
    "attn_config.prefix_lm": ignored("attn_config.prefix_lm", False),
    "attn_config.attn_uses_sequence_id": ignored("attn_config.attn_uses_sequence_id", False),
    "attn_config.alibi": ignored("attn_config.alibi", True),
    "attn_config.alibi_bias_max": ignored("attn_config.alibi_bias_max", 8),
    "logit_scale": ignored("logit_scale", None),
    "no_bias": ignored("no_bias", True),
    "expansion_ratio": ignored("expansion_ratio", EXPANSION),
}
ARCHITECTURES = {"mpt": Architecture("MptForCausalLM", MPT, rigpt_config, REFUSED)}
# What this class and BLOOM can express.
MPT_OPTIONS: dict[str, Callable[[RiGPTConfig], bool] | None] = {
    "position_embedding_type": lambda config: config.position_embedding_type == "alibi",
    "num_key_value_heads": lambda config: config.num_key_value_heads == config.num_attention_heads,
    "head_dim": heads_share_stream,
    "intermediate_size": lambda config: config.intermediate_size == EXPANSION * config.hidden_size,
    "rope_parameters": None,
    "output_bias": None,
}
TARGETS = {
    "mpt": Target(
        name=MPT.name,
        model_class=MptForCausalLM,
        family=MPT,
        expresses={**MPT_OPTIONS, "hidden_act": lambda config: config.hidden_act == "gelu"},
        stock_config=stock_config,
        summary=(
            f"linear biases of scores, an ungated MLP of GELU with {EXPANSION} neurons per dimension, as many "
            "key-value heads as heads, no biases, no q/k normalisation and `head_dim = hidden_size / "
            "num_attention_heads`"
        ),
    )
}
