"""GPT-NeoX and Pythia: attention and MLP side by side or in turn, queries, keys and values head by head in one map."""

import math
from collections.abc import Callable
from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .dropout import coordinate_dropout, vector_dropout
from .llama import kin_config, rotations
from .maps import NORM_BIASES, Architecture, Family, Rule, Target, same


logger = logging.get_logger(__name__)


def head_dim(config: Any) -> int:
    """Dimensions per head, which these classes do not let a configuration choose."""
    return config.hidden_size // config.num_attention_heads


def grouped(index: int, queries: Callable[[Any], int] = lambda config: 1) -> Callable[[Any], Rows]:
    """Queries, keys or values in the map that makes all three: so many queries, a key and a value, group by group."""

    def rows(config: Any) -> Rows:
        count, size = queries(config), head_dim(config)
        start, length = ((0, count), (count, 1), (count + 1, 1))[index]
        return Rows(start * size, length * size, (count + 2) * size)

    return rows


def has_bias(config: GPTNeoXConfig) -> bool:
    """Whether the maps of attention have biases."""
    return config.attention_bias


_N, _L = "gpt_neox.layers.{i}", "model.layers.{i}"
_QKV, _ATTENTION_NORM = f"{_N}.attention.query_key_value", f"{_N}.input_layernorm"

GPT_NEOX = Family(
    name="GPT-NeoX",
    prefix="gpt_neox.",
    rules=(
        Rule("model.embed_tokens", "gpt_neox.embed_in"),
        Rule("model.project_in"),
        Rule(f"{_L}.self_attn.q_proj", _QKV, _ATTENTION_NORM, grouped(0), bias=has_bias),
        Rule(f"{_L}.self_attn.k_proj", _QKV, _ATTENTION_NORM, grouped(1), bias=has_bias),
        Rule(f"{_L}.self_attn.v_proj", _QKV, _ATTENTION_NORM, grouped(2), bias=has_bias),
        Rule(f"{_L}.self_attn.o_proj", f"{_N}.attention.dense"),
        Rule(f"{_L}.mlp.up_proj", f"{_N}.mlp.dense_h_to_4h", f"{_N}.post_attention_layernorm"),
        Rule(f"{_L}.mlp.down_proj", f"{_N}.mlp.dense_4h_to_h"),
        Rule("model.project_out", norm="gpt_neox.final_layer_norm"),
        Rule("lm_head", "lm_head"),
    ),
    fields=same(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "attention_dropout",
        "use_parallel_residual",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    | {"rms_norm_eps": "layer_norm_eps"},
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    embedding="gpt_neox.embed_in",
    centred=True,
    norm_bias=True,
    # Masks and frequencies, which checkpoints of older releases stored.
    harmless=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    options={"attention_output_bias": "attention_bias"},
    # The head has this name in files, and was called so in older releases.
    former={"embed_out.": "lm_head."},
)


def rigpt_config(config: GPTNeoXConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a GPT-NeoX; see [`kin_config`]. Its rotation alone reads a `head_dim`.
    """
    (both,) = vector_dropout({"hidden_dropout": config.hidden_dropout}, dropout)
    return kin_config(
        GPT_NEOX,
        config,
        **NORM_BIASES,
        embedding_size=config.hidden_size,
        head_dim=head_dim(config),
        gated_mlp=False,
        rope_parameters=rotation(config),
        residual_dropout=both,
        embedding_dropout=both,
    )


def stock_config(config: RiGPTConfig) -> GPTNeoXConfig:
    """The configuration of the GPT-NeoX equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide."""
    residual, embedding = coordinate_dropout(config)
    if residual != embedding:
        logger.warning(f"`embedding_dropout={embedding}` was set to {residual}: GPT-NeoX has one dropout for both.")
    return GPTNeoXConfig(
        **GPT_NEOX.stock_fields(config),
        attention_bias=config.attention_bias or config.attention_output_bias,
        hidden_act=config.hidden_act,
        # The class turns a quarter of every head where nothing is said.
        rope_parameters={"partial_rotary_factor": 1.0} | (config.rope_parameters or {}),
        hidden_dropout=residual,
    )


def turned(config: Any, size: int) -> int:
    """Dimensions that turn of a head of this size."""
    return int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))


def rotation(config: Any) -> dict[str, Any]:
    """The rope parameters for heads of the size that attention has."""
    own = head_dim(config)
    turning = turned(config, getattr(config, "head_dim", None) or own)
    if turning == turned(config, own):
        return rotations(config)
    # Rounded up, as the product with the size of a head is rounded down.
    return rotations(config) | {"partial_rotary_factor": math.nextafter(turning / own, 2)}


def other_heads(config: Any) -> str | None:
    """Heads of another size in the rotation, which alone would read it, and does not fit those that there are."""
    size, own = getattr(config, "head_dim", None) or head_dim(config), head_dim(config)
    turning = turned(config, size)
    if size == own or (turning in range(2, own + 1, 2) and config.rope_parameters["rope_type"] != "proportional"):
        return None
    return (
        f"`head_dim={size}` cannot be converted: the rotation of this class reads it, and attention has heads of "
        f"`hidden_size / num_attention_heads` = {own}, of which {turning} dimensions cannot turn in pairs. "
        "Remove it from the source's configuration."
    )


OTHER_HEADS = {"head_dim": other_heads}
ARCHITECTURES = {"gpt_neox": Architecture("GPTNeoXForCausalLM", GPT_NEOX, rigpt_config, OTHER_HEADS)}
TARGETS = {
    "gpt_neox": Target(
        name="GPT-NeoX",
        model_class=GPTNeoXForCausalLM,
        family=GPT_NEOX,
        expresses={
            "num_key_value_heads": lambda config: config.num_key_value_heads == config.num_attention_heads,
            "head_dim": lambda config: config.num_attention_heads * config.head_dim == config.hidden_size,
            "rope_parameters": None,
            "hidden_act": None,
            # A bias that is absent is 0.
            "attention_bias": None,
            "attention_output_bias": None,
            "mlp_bias": None,
            "output_bias": None,
        },
        stock_config=stock_config,
        summary=(
            "rotary positions with fixed frequencies, an ungated MLP, as many key-value heads as heads, no q/k "
            "normalisation and `head_dim = hidden_size / num_attention_heads`"
        ),
    )
}
