"""GPT-2: the weight map, and what each option of `GPT2Config` becomes."""

from collections.abc import Callable

from transformers import GPT2Config, GPT2LMHeadModel

from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation, stock_activation
from .dropout import coordinate_dropout, vector_dropout
from .maps import NORM_BIASES, Architecture, Family, Rows, Rule, Target, only, same


def query_scale(config: GPT2Config, layer: int) -> float:
    """
    GPT-2's scores in units of `q·k / sqrt(head_dim)`: a constant of each layer, which folds into queries.

    `reorder_and_upcast_attn` changes the order and precision of the same product, not its value: nothing to fold.
    """
    scale = 1.0 if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def third(index: int) -> Callable[[GPT2Config], Rows]:
    """Queries, keys or values in the map that makes all three."""
    return lambda config: Rows(index * config.n_embd, config.n_embd, 3 * config.n_embd)


def width(config: RiGPTConfig, least: int) -> int:
    """The size of a stream that holds `least` dimensions: heads share it among them, and none may be too small."""
    heads = config.num_attention_heads
    return heads * max(config.head_dim, -(-least // heads))


_H = "transformer.h.{i}"
_L = "model.layers.{i}"
_QKV, _LN_1, _LN_2 = f"{_H}.attn.c_attn", f"{_H}.ln_1", f"{_H}.ln_2"

GPT2 = Family(
    name="GPT-2",
    prefix="transformer.",
    rules=(
        Rule("model.embed_tokens", "transformer.wte"),
        Rule("model.project_in"),
        Rule("model.embed_positions", "transformer.wpe"),
        Rule(f"{_L}.self_attn.q_proj", _QKV, _LN_1, third(0), query_scale, transposed=True),
        Rule(f"{_L}.self_attn.k_proj", _QKV, _LN_1, third(1), transposed=True),
        Rule(f"{_L}.self_attn.v_proj", _QKV, _LN_1, third(2), transposed=True),
        Rule(f"{_L}.self_attn.o_proj", f"{_H}.attn.c_proj", transposed=True),
        Rule(f"{_L}.mlp.up_proj", f"{_H}.mlp.c_fc", _LN_2, transposed=True),
        Rule(f"{_L}.mlp.down_proj", f"{_H}.mlp.c_proj", transposed=True),
        Rule("model.project_out", norm="transformer.ln_f"),
        Rule("lm_head", "lm_head"),
    ),
    fields=same("vocab_size", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
    | {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
    },
    final_norm="transformer.ln_f",
    head="lm_head",
    embedding="transformer.wte",
    centred=True,
    norm_bias=True,
    # The causal mask, which checkpoints of older releases stored.
    harmless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    width=width,
)


def rigpt_config(config: GPT2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a GPT-2; see [`Architecture.result`]."""
    residual, embedding = vector_dropout({"resid_pdrop": config.resid_pdrop, "embd_pdrop": config.embd_pdrop}, dropout)
    return RiGPTConfig(
        **GPT2.rigpt_fields(config),
        **NORM_BIASES,
        embedding_size=config.n_embd,
        hidden_act=rigpt_activation(config.activation_function, "activation_function"),
        attention_output_bias=True,
        position_embedding_type="learned",
        residual_dropout=residual,
        embedding_dropout=embedding,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_config(config: RiGPTConfig) -> GPT2Config:
    """The configuration of the GPT-2 equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide."""
    residual, embedding = coordinate_dropout(config)
    return GPT2Config(
        **GPT2.stock_fields(config),
        activation_function=stock_activation(config.hidden_act),
        resid_pdrop=residual,
        embd_pdrop=embedding,
    )


REFUSED = only(
    "add_cross_attention",
    (False,),
    "RiGPT is a decoder without an encoder to attend to",
    "Convert a GPT-2 with `add_cross_attention=False`",
)
# What this class and its kin can express.
GPT2_OPTIONS: dict[str, Callable[[RiGPTConfig], bool] | None] = {
    "position_embedding_type": lambda config: config.position_embedding_type == "learned",
    "num_key_value_heads": lambda config: config.num_key_value_heads == config.num_attention_heads,
    "head_dim": None,
    "rope_parameters": None,
    # A bias that is absent is 0.
    "attention_bias": None,
    "attention_output_bias": None,
    "mlp_bias": None,
    "output_bias": None,
    "hidden_act": None,
}
ARCHITECTURES = {"gpt2": Architecture("GPT2LMHeadModel", GPT2, rigpt_config, REFUSED)}
TARGETS = {
    "gpt2": Target(
        name="GPT-2",
        model_class=GPT2LMHeadModel,
        family=GPT2,
        expresses=GPT2_OPTIONS,
        stock_config=stock_config,
        summary="learned positions, an ungated MLP, as many key-value heads as heads and no q/k normalisation",
    )
}
