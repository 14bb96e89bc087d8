"""NanoChat: norms without gains, also of queries and keys, and a rotation backwards."""

from transformers import NanoChatConfig, NanoChatForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig, rotary_frequencies
from .llama import (
    ATTENTION_BIASES,
    LLAMA,
    PARTIAL,
    ROTARY,
    UNGATED,
    head_dim,
    kin_config,
    kin_target,
    turns_whole_heads,
)
from .maps import Architecture, same


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
    options=ATTENTION_BIASES | same("final_logit_softcapping"),
    embedding_norm=True,
)


def rigpt_config(config: NanoChatConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a NanoChat; see [`Architecture.result`] and [`kin_config`]."""
    return kin_config(NANOCHAT, config, embedding_size=None, gated_mlp=False, qk_norm=True, embedding_norm=True)


def stretched(config: NanoChatConfig) -> str | None:
    """Cosines and sines longer than 1, which NanoChat's norm behind the rotation takes out again, but for `eps`."""
    rope_type = config.rope_parameters["rope_type"]
    scaling = ROPE_INIT_FUNCTIONS[rope_type](config)[1] if rope_type in ROPE_INIT_FUNCTIONS else 1.0
    if scaling == 1.0:
        return None
    return (
        f"`rope_parameters['rope_type']={rope_type!r}` makes queries and keys {scaling:.4g} times as long, before "
        "NanoChat's norm of them and after RiGPT's. Set `rope_parameters['attention_factor']` to 1.0 in the source's "
        "configuration."
    )


REFUSED = {
    **PARTIAL,
    "rope_parameters['attention_factor']": stretched,
}
ARCHITECTURES = {"nanochat": Architecture("NanoChatForCausalLM", NANOCHAT, rigpt_config, REFUSED)}
TARGETS = {
    "nanochat": kin_target(
        NanoChatForCausalLM,
        NANOCHAT,
        f"{ROTARY} that leave lengths alone, an ungated MLP, q/k normalisation and normalised embeddings",
        {
            **UNGATED,
            "qk_norm": lambda config: config.qk_norm,
            "embedding_norm": lambda config: config.embedding_norm,
            # Its norm of queries and keys comes after the rotation, and ours before.
            "rope_parameters": lambda config: (
                config.rope_parameters is None
                or (turns_whole_heads(config.rope_parameters) and rotary_frequencies(config)[1] == 1.0)
            ),
        },
    ),
}
