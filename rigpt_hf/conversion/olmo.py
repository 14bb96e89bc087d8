"""OLMo (the first): Llama's weight map with LayerNorms that have neither gain nor bias, but subtract the mean."""

from transformers import OlmoConfig, OlmoForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import ATTENTION_BIASES, LLAMA, PARTIAL, ROTARY, kin_config, kin_target
from .maps import Architecture, only


# The library's class has it as a constant.
EPS = 1e-5
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "project_out", "lm_head")

OLMO = LLAMA.varied(
    "OLMo",
    {reader: {"norm": None} for reader in _READERS},
    fields={ours: theirs for ours, theirs in LLAMA.fields.items() if ours != "rms_norm_eps"},
    centred=True,
    options=ATTENTION_BIASES,
)


def rigpt_config(config: OlmoConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to an OLMo; see [`kin_config`]."""
    return kin_config(OLMO, config, rms_norm_eps=EPS)


CLIPPED = only(
    "clip_qkv",
    (None,),
    "it cuts off single coordinates of queries, keys and values, which prefers a basis",
    "Set it to `None` in the source's configuration if nothing reaches it, and see by `rigpt verify` on your text "
    "whether that is so",
)
ARCHITECTURES = {"olmo": Architecture("OlmoForCausalLM", OLMO, rigpt_config, PARTIAL | CLIPPED)}
TARGETS = {
    "olmo": kin_target(
        OlmoForCausalLM, OLMO, f"{ROTARY}, LayerNorms without gains and biases, `eps` {EPS}, a gated MLP"
    )
}
