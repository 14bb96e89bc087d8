"""NanoChat without its cap on logits: norms without gains, also of queries and keys, and a rotation backwards."""

from transformers import NanoChatConfig

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from ..rope_rigpt import rotary_frequencies
from .llama import LLAMA, head_dim, kin_config
from .maps import Architecture


def backwards(config: NanoChatConfig) -> Rows:
    """Heads of queries and keys, whose planes NanoChat turns the other way."""
    return Rows(0, head_dim(config), head_dim(config), swapped=True)


_NO_NORM = {"norm": None}
_MLP = "model.layers.{i}.mlp"

NANOCHAT = LLAMA.varied(
    "NanoChat",
    {
        "q_proj": _NO_NORM | {"rows": backwards},
        "k_proj": _NO_NORM | {"rows": backwards},
        "v_proj": _NO_NORM,
        "gate_proj": None,
        "up_proj": _NO_NORM | {"source": f"{_MLP}.fc1"},
        "down_proj": {"source": f"{_MLP}.fc2"},
        "project_in": None,
        "project_out": None,
        "lm_head": _NO_NORM,
    },
)


def rigpt_config(config: NanoChatConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a NanoChat; see [`kin_config`].

    Raises:
        ValueError: if an option of the source has no exact form; the message names it.
    """
    if (cap := config.final_logit_softcapping) is not None:
        raise ValueError(
            f"`final_logit_softcapping={cap}` cannot be converted: it bends logits, and RiGPT has a linear head. Set "
            "it to `None` in the configuration if you need only which token is likelier than which: "
            "probabilities become other ones."
        )
    result = kin_config(NANOCHAT, config, embedding_size=None, gated_mlp=False, qk_norm=True, embedding_norm=True)
    if (scaling := rotary_frequencies(result)[1]) != 1.0:
        raise ValueError(
            f"`rope_parameters['rope_type']={config.rope_parameters['rope_type']!r}` makes queries and keys "
            f"{scaling:.4g} times as long, in front of NanoChat's norm of them and behind RiGPT's. Set "
            "`rope_parameters['attention_factor']` to 1.0 in the source's configuration."
        )
    return result


ARCHITECTURES = {"nanochat": Architecture("NanoChatForCausalLM", NANOCHAT, rigpt_config)}
