"""Falcon, in its newer architecture and the older ones: attention and MLP side by side, or in turn."""

from typing import Any

from transformers import FalconConfig, FalconForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation
from .dropout import stock_dropouts, vector_dropout
from .gpt_neox import grouped
from .llama import BIASES, PARTIAL, ROTARY, heads_share_stream, turns_whole_heads
from .maps import NORM_BIASES, Architecture, Family, Rule, Target, only, same


def key_value_heads(config: FalconConfig) -> int:
    """Heads of keys and values, as the class reads them."""
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


def queries(config: FalconConfig) -> int:
    """Queries that share a key."""
    return config.num_attention_heads // key_value_heads(config)


def in_parallel(config: FalconConfig) -> bool:
    """Whether attention and MLP read the same stream."""
    return bool(config.new_decoder_architecture or config.parallel_attn)


def has_bias(config: FalconConfig) -> bool:
    """Whether linear maps have biases."""
    return bool(config.bias)


_H, _L = "transformer.h.{i}", "model.layers.{i}"
_QKV, _NORM = f"{_H}.self_attention.query_key_value", f"{_H}.input_layernorm"

# With one norm for attention and MLP.
FALCON = Family(
    name="Falcon",
    prefix="transformer.",
    rules=(
        Rule("model.embed_tokens", "transformer.word_embeddings"),
        Rule("model.project_in"),
        Rule(f"{_L}.self_attn.q_proj", _QKV, _NORM, grouped(0, queries), bias=has_bias),
        Rule(f"{_L}.self_attn.k_proj", _QKV, _NORM, grouped(1, queries), bias=has_bias),
        Rule(f"{_L}.self_attn.v_proj", _QKV, _NORM, grouped(2, queries), bias=has_bias),
        Rule(f"{_L}.self_attn.o_proj", f"{_H}.self_attention.dense"),
        Rule(f"{_L}.mlp.up_proj", f"{_H}.mlp.dense_h_to_4h", _NORM, bias=has_bias),
        Rule(f"{_L}.mlp.down_proj", f"{_H}.mlp.dense_4h_to_h", bias=has_bias),
        Rule("model.project_out", norm="transformer.ln_f"),
        Rule("lm_head", "lm_head"),
    ),
    fields=same(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    | {"rms_norm_eps": "layer_norm_epsilon", "intermediate_size": "ffn_hidden_size"},
    final_norm="transformer.ln_f",
    head="lm_head",
    embedding="transformer.word_embeddings",
    centred=True,
    norm_bias=True,
    # Frequencies, which checkpoints of older releases stored.
    harmless=(r"transformer\.h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",),
    options={"attention_output_bias": "bias"},
)


def variant(config: FalconConfig) -> Family:
    """The weight map of a Falcon, whose MLP may have a norm of its own."""
    attention = mlp = _NORM
    if not in_parallel(config):
        mlp = f"{_H}.post_attention_layernorm"
    elif config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        attention, mlp = f"{_H}.ln_attn", f"{_H}.ln_mlp"
    changes: dict[str, dict[str, Any]] = {name: {"norm": attention} for name in ("q_proj", "k_proj", "v_proj")}
    return FALCON.varied(FALCON.name, changes | {"up_proj": {"norm": mlp}})


def rigpt_config(config: FalconConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a Falcon; see [`Architecture.result`]. It drops no probabilities of
    attention, whatever its configuration says.
    """
    (residual,) = vector_dropout({"hidden_dropout": config.hidden_dropout}, dropout)
    return RiGPTConfig(
        **FALCON.rigpt_fields(config),
        **NORM_BIASES,
        embedding_size=config.hidden_size,
        num_key_value_heads=key_value_heads(config),
        hidden_act=rigpt_activation(config.activation, "activation"),
        use_parallel_residual=in_parallel(config),
        rope_parameters=dict(config.rope_parameters),
        residual_dropout=residual,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_config(config: RiGPTConfig) -> FalconConfig:
    """
    The configuration of the Falcon equal to a RiGPT, but for `tie_word_embeddings`: where attention and MLP stand side
    by side of the newer architecture, with one norm.
    """
    parallel, heads = config.use_parallel_residual, config.num_key_value_heads
    dropouts = stock_dropouts(config, FALCON.name, ("hidden_dropout",))
    return FalconConfig(
        **FALCON.stock_fields(config),
        **dropouts,
        # In blocks that follow each other the class takes it for what attention writes.
        attention_dropout=dropouts["hidden_dropout"],
        new_decoder_architecture=parallel,
        parallel_attn=parallel,
        num_ln_in_parallel_attn=1 if parallel else None,
        num_kv_heads=heads,
        multi_query=not parallel and heads == 1,
        bias=config.attention_output_bias,
        activation=config.hidden_act,
        rope_parameters=dict(config.rope_parameters or {}),
    )


def serial_dropout(config: FalconConfig) -> str | None:
    """A refusal of a second probability of dropout, which attention's output has in blocks that are not parallel."""
    if in_parallel(config) or config.attention_dropout == config.hidden_dropout:
        return None
    return (
        f"`attention_dropout={config.attention_dropout}` cannot be converted: with `parallel_attn=False` it drops "
        f"what attention writes, and `hidden_dropout={config.hidden_dropout}` what the MLP does; RiGPT has one "
        "probability for both. Set one to the other in the source's configuration, which changes nothing but training."
    )


def impossible(config: FalconConfig) -> str | None:
    """Norms that the library's class does not find when it computes."""
    if config.new_decoder_architecture and not config.parallel_attn:
        given = f"`parallel_attn={config.parallel_attn}` with `new_decoder_architecture=True`"
    elif in_parallel(config) and not config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        given = "`num_ln_in_parallel_attn=2` with `new_decoder_architecture=False`"
    else:
        return None
    return (
        f"{given} cannot be converted: Transformers' own class makes such a model and cannot compute it. Set the two "
        "in the source's configuration to what its weights were trained with."
    )


REFUSED = {
    **PARTIAL,
    **only(
        "alibi",
        (False, None),
        "its class rounds slopes and their products with positions to bfloat16 whatever its dtype, so that what it "
        "adds to scores is not proportional to a distance",
        "Convert a Falcon with rotary positions",
    ),
    "attention_dropout": serial_dropout,
    "num_ln_in_parallel_attn": impossible,
}
ARCHITECTURES = {"falcon": Architecture("FalconForCausalLM", FALCON, rigpt_config, REFUSED, variant)}
TARGETS = {
    "falcon": Target(
        name=FALCON.name,
        model_class=FalconForCausalLM,
        family=FALCON,
        expresses={
            **BIASES,
            "output_bias": None,
            "hidden_act": None,
            "head_dim": heads_share_stream,
            "rope_parameters": lambda config: turns_whole_heads(config.rope_parameters or {}),
            "use_parallel_residual": None,
            "num_key_value_heads": lambda config: (
                config.use_parallel_residual or config.num_key_value_heads in (1, config.num_attention_heads)
            ),
        },
        stock_config=stock_config,
        summary=(
            f"{ROTARY}, LayerNorms, an ungated MLP, no q/k normalisation, `head_dim = hidden_size / "
            "num_attention_heads` and, in blocks that follow each other, one key-value head or as many as heads"
        ),
        variant=variant,
    )
}
