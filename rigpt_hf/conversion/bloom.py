"""
BLOOM: the weight map, and what each option of `BloomConfig` becomes.

Its class writes the `sqrt(2/pi)` of its GELU with eight digits, which is rounding in float32 and is left out here. Its
linear biases of scores are from slopes of float32; in 16 bits it also rounds their products with positions.
"""

from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from ..configuration_rigpt import RiGPTConfig
from .dropout import stock_dropouts, vector_dropout
from .gpt_neox import grouped
from .llama import BIASES
from .maps import NORM_BIASES, Architecture, Family, Rule, Target, only, same
from .mpt import MPT_OPTIONS


# What BLOOM was trained with, and its configuration says only beside the library's fields.
LENGTH = 2048


def slopes(config: BloomConfig) -> list[float]:
    """The slopes by which the class multiplies positions, as float32 rounds them."""
    return _get_alibi_slopes(config.n_head, "cpu").tolist()


_H, _L = "transformer.h.{i}", "model.layers.{i}"
_QKV, _NORM = f"{_H}.self_attention.query_key_value", f"{_H}.input_layernorm"

BLOOM = Family(
    name="BLOOM",
    prefix="transformer.",
    rules=(
        Rule("model.embed_tokens", "transformer.word_embeddings"),
        Rule("model.project_in"),
        Rule("model.embedding_map", norm="transformer.word_embeddings_layernorm"),
        Rule(f"{_L}.self_attn.alibi", values=slopes),
        Rule(f"{_L}.self_attn.q_proj", _QKV, _NORM, grouped(0)),
        Rule(f"{_L}.self_attn.k_proj", _QKV, _NORM, grouped(1)),
        Rule(f"{_L}.self_attn.v_proj", _QKV, _NORM, grouped(2)),
        Rule(f"{_L}.self_attn.o_proj", f"{_H}.self_attention.dense"),
        Rule(f"{_L}.mlp.up_proj", f"{_H}.mlp.dense_h_to_4h", f"{_H}.post_attention_layernorm"),
        Rule(f"{_L}.mlp.down_proj", f"{_H}.mlp.dense_4h_to_h"),
        Rule("model.project_out", norm="transformer.ln_f"),
        Rule("lm_head", "lm_head"),
    ),
    fields=same(
        "vocab_size",
        "hidden_size",
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    | {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "rms_norm_eps": "layer_norm_epsilon"},
    final_norm="transformer.ln_f",
    head="lm_head",
    embedding="transformer.word_embeddings",
    centred=True,
    norm_bias=True,
    harmless=(),
    embedding_norm=True,
)


def rigpt_config(config: BloomConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a BLOOM; see [`Architecture.result`]."""
    (residual,) = vector_dropout({"hidden_dropout": config.hidden_dropout}, dropout)
    return RiGPTConfig(
        **BLOOM.rigpt_fields(config),
        **NORM_BIASES,
        embedding_size=config.hidden_size,
        attention_output_bias=True,
        max_position_embeddings=getattr(config, "seq_length", None) or LENGTH,
        position_embedding_type="alibi",
        embedding_norm=True,
        embedding_norm_map=True,
        residual_dropout=residual,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_config(config: RiGPTConfig) -> BloomConfig:
    """The configuration of the BLOOM equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide."""
    return BloomConfig(
        **BLOOM.stock_fields(config),
        **stock_dropouts(config, BLOOM.name, ("hidden_dropout",)),
        seq_length=config.max_position_embeddings,
    )


REFUSED = only(
    "apply_residual_connection_post_layernorm",
    (False,),
    "its norms stand on the residual path itself, where a gain folds into no weight",
    "Convert another BLOOM: those that were published do without",
)
ARCHITECTURES = {"bloom": Architecture("BloomForCausalLM", BLOOM, rigpt_config, REFUSED)}
TARGETS = {
    "bloom": Target(
        name=BLOOM.name,
        model_class=BloomForCausalLM,
        family=BLOOM,
        expresses={
            **MPT_OPTIONS,
            **BIASES,
            "embedding_norm": lambda config: config.embedding_norm,
            "embedding_norm_map": lambda config: config.embedding_norm_map,
            "hidden_act": lambda config: config.hidden_act == "gelu_pytorch_tanh",
            "max_position_embeddings": None,
        },
        stock_config=stock_config,
        summary=(
            "linear biases of scores, normalised embeddings with a map behind, an ungated MLP of GELU with 4 neurons "
            "per dimension, as many key-value heads as heads and no q/k normalisation"
        ),
    )
}
