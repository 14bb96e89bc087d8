"""GPT-J: attention and MLP read one norm side by side, neighbours turn together, and the head has a bias."""

import math

from transformers import GPTJConfig, GPTJForCausalLM

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation, stock_activation
from .dropout import stock_dropouts, vector_dropout
from .gpt2 import GPT2, GPT2_OPTIONS
from .gpt_neox import head_dim
from .llama import heads_share_stream
from .maps import NORM_BIASES, Architecture, Target


# A constant of the library's class.
ROPE_THETA = 10000.0


def interleaved(config: GPTJConfig) -> Rows:
    """The rows of each head, of which the first are pairs of neighbours."""
    return Rows(0, head_dim(config), head_dim(config), interleaved=config.rotary_dim)


def no_bias(config: GPTJConfig) -> bool:
    """Its maps of attention have none."""
    return False


_H = "transformer.h.{i}"
_PLAIN = {"rows": None, "scale": None, "transposed": False}

GPTJ = GPT2.varied(
    "GPT-J",
    {
        "embed_positions": None,
        "q_proj": {**_PLAIN, "source": f"{_H}.attn.q_proj", "rows": interleaved, "bias": no_bias},
        "k_proj": {**_PLAIN, "source": f"{_H}.attn.k_proj", "rows": interleaved, "bias": no_bias},
        "v_proj": {**_PLAIN, "source": f"{_H}.attn.v_proj", "bias": no_bias},
        "o_proj": {**_PLAIN, "source": f"{_H}.attn.out_proj"},
        "up_proj": {**_PLAIN, "source": f"{_H}.mlp.fc_in", "norm": f"{_H}.ln_1"},
        "down_proj": {**_PLAIN, "source": f"{_H}.mlp.fc_out"},
    },
    # Masks and angles, which checkpoints of older releases stored.
    harmless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
    head_bias=True,
    width=None,
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


def is_turned_as_gptj(config: RiGPTConfig) -> bool:
    """Whether positions turn heads by the frequencies that are constants of the class."""
    rope = dict(config.rope_parameters or {})
    rope.pop("partial_rotary_factor", None)
    return rope == {"rope_type": "default", "rope_theta": ROPE_THETA}


def stock_config(config: RiGPTConfig) -> GPTJConfig:
    """The configuration of the GPT-J equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide."""
    turned = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return GPTJConfig(
        **GPTJ.stock_fields(config),
        **stock_dropouts(config, GPTJ.name, ("resid_pdrop", "embd_pdrop")),
        activation_function=stock_activation(config.hidden_act),
        rotary_dim=int(config.head_dim * turned),
    )


TARGETS = {
    "gptj": Target(
        name=GPTJ.name,
        model_class=GPTJForCausalLM,
        family=GPTJ,
        expresses={
            **GPT2_OPTIONS,
            "position_embedding_type": lambda config: config.position_embedding_type == "rotary",
            "head_dim": heads_share_stream,
            "rope_parameters": is_turned_as_gptj,
            "use_parallel_residual": lambda config: config.use_parallel_residual,
        },
        stock_config=stock_config,
        summary=(
            f"rotary positions with `rope_theta` {ROPE_THETA:g}, attention and an ungated MLP side by side, as many "
            "key-value heads as heads, no biases in attention, no q/k normalisation and "
            "`head_dim = hidden_size / num_attention_heads`"
        ),
    )
}
