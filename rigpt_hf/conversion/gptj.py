"""GPT-J: attention and MLP read one norm side by side, neighbours turn together, and the head has a bias."""

import math

from transformers import GPTJConfig

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation
from .dropout import vector_dropout
from .gpt_neox import head_dim
from .maps import NORM_BIASES, Architecture, Family, Rule, same


# A constant of the library's class.
ROPE_THETA = 10000.0


def interleaved(config: GPTJConfig) -> Rows:
    """The rows of each head, of which the first are pairs of neighbours."""
    return Rows(0, head_dim(config), head_dim(config), interleaved=config.rotary_dim)


def no_bias(config: GPTJConfig) -> bool:
    """Its maps of attention have none."""
    return False


_H, _L = "transformer.h.{i}", "model.layers.{i}"
_NORM = f"{_H}.ln_1"

GPTJ = Family(
    name="GPT-J",
    prefix="transformer.",
    rules=(
        Rule("model.embed_tokens", "transformer.wte"),
        Rule("model.project_in"),
        Rule(f"{_L}.self_attn.q_proj", f"{_H}.attn.q_proj", _NORM, interleaved, bias=no_bias),
        Rule(f"{_L}.self_attn.k_proj", f"{_H}.attn.k_proj", _NORM, interleaved, bias=no_bias),
        Rule(f"{_L}.self_attn.v_proj", f"{_H}.attn.v_proj", _NORM, bias=no_bias),
        Rule(f"{_L}.self_attn.o_proj", f"{_H}.attn.out_proj"),
        Rule(f"{_L}.mlp.up_proj", f"{_H}.mlp.fc_in", _NORM),
        Rule(f"{_L}.mlp.down_proj", f"{_H}.mlp.fc_out"),
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
    # Masks and angles, which checkpoints of older releases stored.
    harmless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
    head_bias=True,
)


def rigpt_config(config: GPTJConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a GPT-J; see [`Architecture.result`]."""
    residual, embedding = vector_dropout({"resid_pdrop": config.resid_pdrop, "embd_pdrop": config.embd_pdrop}, dropout)
    return RiGPTConfig(
        **GPTJ.rigpt_fields(config),
        **NORM_BIASES,
        embedding_size=config.n_embd + 1,
        hidden_act=rigpt_activation(config.activation_function, "activation_function"),
        use_parallel_residual=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            # Rounded up, as the product with the size of a head is rounded down.
            "partial_rotary_factor": math.nextafter(config.rotary_dim / head_dim(config), 2),
        },
        residual_dropout=residual,
        embedding_dropout=embedding,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def unturned(config: GPTJConfig) -> str | None:
    """A part of a head that is not there."""
    if config.rotary_dim in range(2, head_dim(config) + 1, 2):
        return None
    return (
        f"`rotary_dim={config.rotary_dim}` cannot be converted: so many dimensions of a head of {head_dim(config)} "
        "cannot be turned in pairs. Set it to what the model was trained with."
    )


ARCHITECTURES = {"gptj": Architecture("GPTJForCausalLM", GPTJ, rigpt_config, {"rotary_dim": unturned})}
