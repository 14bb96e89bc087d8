"""GPT-2: the weight map, and what each option of `GPT2Config` becomes."""

from transformers import GPT2Config

from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation, stock_activation
from .dropout import coordinate_dropout, vector_dropout
from .maps import Family, Role, Rule


def query_scale(config: GPT2Config, layer: int) -> float:
    """
    What GPT-2's scores are, in units of `q·k / sqrt(head_dim)`: a constant of each layer, which folds into queries.

    `reorder_and_upcast_attn` changes the order and precision of the same product, not its value: nothing to fold.
    """
    scale = 1.0 if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


_H = "transformer.h.{i}"
_L = "model.layers.{i}"

GPT2 = Family(
    name="GPT-2",
    prefix="transformer.",
    rules=(
        Rule("model.embed_tokens", Role.COPY, "transformer.wte"),
        Rule("model.project_in", Role.INJECTION),
        Rule("model.embed_positions", Role.POSITIONS, "transformer.wpe"),
        Rule(f"{_L}.self_attn.q_proj", Role.READER, f"{_H}.attn.c_attn", f"{_H}.ln_1", part=(0, 3), is_query=True),
        Rule(f"{_L}.self_attn.k_proj", Role.READER, f"{_H}.attn.c_attn", f"{_H}.ln_1", part=(1, 3)),
        Rule(f"{_L}.self_attn.v_proj", Role.READER, f"{_H}.attn.c_attn", f"{_H}.ln_1", part=(2, 3)),
        Rule(f"{_L}.self_attn.o_proj", Role.WRITER, f"{_H}.attn.c_proj"),
        Rule(f"{_L}.mlp.up_proj", Role.READER, f"{_H}.mlp.c_fc", f"{_H}.ln_2"),
        Rule(f"{_L}.mlp.down_proj", Role.WRITER, f"{_H}.mlp.c_proj"),
        Rule("model.project_out", Role.EXTRACTION, norm="transformer.ln_f"),
    ),
    tied_rules=(),
    untied_rules=(Rule("lm_head", Role.COPY, "lm_head"),),
    final_norm="transformer.ln_f",
    head="lm_head",
    embedding="transformer.wte",
    centred=True,
    norm_bias=True,
    transposed=(f"{_H}.attn.c_attn", f"{_H}.attn.c_proj", f"{_H}.mlp.c_fc", f"{_H}.mlp.c_proj"),
    # The causal mask, which checkpoints of older releases stored.
    harmless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    query_scale=query_scale,
)


def rigpt_config(config: GPT2Config, dropout: str = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a GPT-2.

    Args:
        config (`GPT2Config`): the source's configuration.
        dropout (`str`, defaults to `"vector"`): see [`convert_model`].

    Raises:
        ValueError: if an option of the source has no exact form; the message names it.
    """
    if config.add_cross_attention:
        raise ValueError(
            "`add_cross_attention=True` cannot be converted: RiGPT is a decoder without an encoder to attend to. "
            "Convert a GPT-2 with `add_cross_attention=False`."
        )
    residual, embedding = vector_dropout({"resid_pdrop": config.resid_pdrop, "embd_pdrop": config.embd_pdrop}, dropout)
    return RiGPTConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.n_embd,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        hidden_act=rigpt_activation(config.activation_function, "activation_function"),
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        output_bias=True,
        position_embedding_type="learned",
        max_position_embeddings=config.n_positions,
        rms_norm_eps=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        attention_dropout=config.attn_pdrop,
        residual_dropout=residual,
        embedding_dropout=embedding,
        tie_word_embeddings=config.tie_word_embeddings,
        use_cache=config.use_cache,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def stock_config(config: RiGPTConfig) -> GPT2Config:
    """
    The configuration of the GPT-2 equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide.

    Args:
        config (`RiGPTConfig`): the source's configuration.

    Raises:
        ValueError: if GPT-2 cannot express an option; the message names it.
    """
    heads = config.num_attention_heads
    for field, rule in (
        ("position_embedding_type", config.position_embedding_type == "learned"),
        ("gated_mlp", not config.gated_mlp),
        ("num_key_value_heads", config.num_key_value_heads == heads),
        ("qk_norm", not config.qk_norm),
        ("head_dim", heads * config.head_dim == config.hidden_size),
    ):
        if not rule:
            raise ValueError(
                f"`{field}={getattr(config, field)!r}` has no counterpart in GPT-2, which has learned positions, an "
                "ungated MLP, as many key-value heads as heads, no q/k normalisation and `head_dim = hidden_size / "
                "num_attention_heads`. Keep this model as RiGPT, or try `target='llama'`."
            )
    residual, embedding = coordinate_dropout(config)
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=heads,
        n_inner=config.intermediate_size,
        activation_function=stock_activation(config.hidden_act),
        resid_pdrop=residual,
        embd_pdrop=embedding,
        attn_pdrop=config.attention_dropout,
        layer_norm_epsilon=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        use_cache=config.use_cache,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
