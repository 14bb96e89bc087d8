"""
OPT: the weight map, and what each option of `OPTConfig` becomes.

Called without `position_ids`, OPT counts positions in an attention mask, and RiGPT from the left end, as GPT-2 does:
with padding on the left give them, as `generate` does.
"""

from typing import Any

from transformers import OPTConfig, OPTForCausalLM

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation, stock_activation
from .dropout import stock_dropouts, vector_dropout
from .gpt2 import GPT2_OPTIONS
from .llama import heads_share_stream
from .maps import Architecture, Family, Rule, Target, only, same


# Constants of the library's class.
EPS, FIRST_POSITION = 1e-5, 2


def positions(config: OPTConfig) -> Rows:
    """The table of positions without its first rows, which belong to no position."""
    length = config.max_position_embeddings
    return Rows(FIRST_POSITION, length, FIRST_POSITION + length)


def has_biases(config: OPTConfig) -> bool:
    """Whether linear maps have biases."""
    return config.enable_bias


_D = "model.decoder"
_B, _L = f"{_D}.layers.{{i}}", "model.layers.{i}"
_ATTENTION_NORM, _MLP_NORM, _LAST_NORM = (
    f"{_B}.self_attn_layer_norm",
    f"{_B}.final_layer_norm",
    f"{_D}.final_layer_norm",
)

OPT = Family(
    name="OPT",
    prefix="model.",
    rules=(
        Rule("model.embed_tokens", f"{_D}.embed_tokens"),
        Rule("model.project_in"),
        Rule("model.embed_positions", f"{_D}.embed_positions", rows=positions),
        Rule(f"{_L}.self_attn.q_proj", f"{_B}.self_attn.q_proj", _ATTENTION_NORM, bias=has_biases),
        Rule(f"{_L}.self_attn.k_proj", f"{_B}.self_attn.k_proj", _ATTENTION_NORM, bias=has_biases),
        Rule(f"{_L}.self_attn.v_proj", f"{_B}.self_attn.v_proj", _ATTENTION_NORM, bias=has_biases),
        Rule(f"{_L}.self_attn.o_proj", f"{_B}.self_attn.out_proj", bias=has_biases),
        Rule(f"{_L}.mlp.up_proj", f"{_B}.fc1", _MLP_NORM, bias=has_biases),
        Rule(f"{_L}.mlp.down_proj", f"{_B}.fc2", bias=has_biases),
        Rule("model.project_out", norm=_LAST_NORM),
        Rule("lm_head", "lm_head"),
    ),
    fields=same(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "attention_dropout",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    | {"intermediate_size": "ffn_dim", "initializer_range": "init_std"},
    final_norm=_LAST_NORM,
    head="lm_head",
    embedding=f"{_D}.embed_tokens",
    centred=True,
    norm_bias=True,
    harmless=(),
)


def variant(config: OPTConfig) -> Family:
    """The weight map of an OPT whose norms may have no gains, and whose embeddings may have a size of their own."""
    changes: dict[str, dict[str, Any]] = {}
    if not config.layer_norm_elementwise_affine:
        changes = {name: {"norm": None} for name in ("q_proj", "k_proj", "v_proj", "up_proj", "project_out")}
    if config.word_embed_proj_dim != config.hidden_size:
        changes["project_in"] = {"source": f"{_D}.project_in"}
        own = {"source": f"{_D}.project_out", "bias": lambda config: False}
        changes["project_out"] = own | changes.get("project_out", {})
    return OPT.varied(OPT.name, changes)


def rigpt_config(config: OPTConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to an OPT; see [`Architecture.result`]."""
    biased, affine = config.enable_bias, config.layer_norm_elementwise_affine
    (residual,) = vector_dropout({"dropout": config.dropout}, dropout)
    return RiGPTConfig(
        **OPT.rigpt_fields(config),
        embedding_size=config.word_embed_proj_dim,
        hidden_act=rigpt_activation(config.activation_function, "activation_function"),
        # Readers take over what norms add, and one option is for all maps of the MLP.
        attention_bias=biased or affine,
        attention_output_bias=biased,
        mlp_bias=biased or affine,
        output_bias=affine,
        position_embedding_type="learned",
        rms_norm_eps=EPS,
        residual_dropout=residual,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_config(config: RiGPTConfig) -> OPTConfig:
    """The configuration of the OPT equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide."""
    return OPTConfig(
        **OPT.stock_fields(config),
        **stock_dropouts(config, OPT.name, ("dropout",)),
        activation_function=stock_activation(config.hidden_act),
        enable_bias=config.attention_output_bias,
    )


REFUSED = {
    **only(
        "do_layer_norm_before",
        (True,),
        "its norms stand on the residual path itself, where a gain folds into no weight",
        "Convert another OPT: of those that were published, 350m alone is so",
    ),
    **only(
        "_remove_final_layer_norm",
        (False,),
        "the head reads a stream without a norm, and RiGPT's always has one",
        "Convert an OPT with its last norm",
    ),
    **only(
        "layerdrop",
        (0.0,),
        "it leaves out whole layers at random in training, and RiGPT never does",
        "Set it to 0.0 in the source's configuration, which changes nothing but training",
    ),
}
ARCHITECTURES = {"opt": Architecture("OPTForCausalLM", OPT, rigpt_config, REFUSED, variant)}
TARGETS = {
    "opt": Target(
        name=OPT.name,
        model_class=OPTForCausalLM,
        family=OPT,
        expresses={**GPT2_OPTIONS, "head_dim": heads_share_stream},
        stock_config=stock_config,
        summary=(
            f"learned positions, LayerNorms with `eps` {EPS}, an ungated MLP, as many key-value heads as heads, no "
            "q/k normalisation and `head_dim = hidden_size / num_attention_heads`"
        ),
    )
}
