"""SmolLM3: Llama's weight map; positions do not turn every fourth layer, and layers may slide."""

from transformers import SmolLM3Config

from ..configuration_rigpt import RiGPTConfig
from .llama import LLAMA, PARTIAL, kin_config, sight
from .maps import Architecture


SMOLLM3 = LLAMA.varied("SmolLM3")


def rigpt_config(config: SmolLM3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a SmolLM3; see [`Architecture.result`] and [`kin_config`]."""
    # The list may be longer than the model.
    turned = list(config.no_rope_layers[: config.num_hidden_layers])
    return kin_config(SMOLLM3, config, no_rope_layers=None if all(turned) else turned, **sight(config, True))


ARCHITECTURES = {"smollm3": Architecture("SmolLM3ForCausalLM", SMOLLM3, rigpt_config, PARTIAL)}
