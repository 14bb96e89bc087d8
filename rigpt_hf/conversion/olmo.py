"""OLMo (the first): Llama's weight map with LayerNorms that have neither gain nor bias, but subtract the mean."""

from transformers import OlmoConfig

from ..configuration_rigpt import RiGPTConfig
from .llama import LLAMA, kin_config
from .maps import Architecture


# The library's class has it as a constant.
EPS = 1e-5
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "project_out", "lm_head")

OLMO = LLAMA.varied(
    "OLMo",
    {reader: {"norm": None} for reader in _READERS},
    fields={ours: theirs for ours, theirs in LLAMA.fields.items() if ours != "rms_norm_eps"},
    centred=True,
)


def rigpt_config(config: OlmoConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to an OLMo; see [`kin_config`].

    Raises:
        ValueError: if an option of the source has no exact form; the message names it.
    """
    if config.clip_qkv is not None:
        raise ValueError(
            f"`clip_qkv={config.clip_qkv}` cannot be converted: it cuts off single coordinates of queries, keys and "
            "values, which prefers a basis. Set it to `None` in the source's configuration if nothing reaches it, and "
            "see by `rigpt verify` on your text whether that is so."
        )
    return kin_config(OLMO, config, rms_norm_eps=EPS)


ARCHITECTURES = {"olmo": Architecture("OlmoForCausalLM", OLMO, rigpt_config)}
