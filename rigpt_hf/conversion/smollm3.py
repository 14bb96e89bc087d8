"""SmolLM3: Llama's weight map; positions do not turn every fourth layer, and layers may slide."""

from typing import Any

from transformers import SmolLM3Config, SmolLM3ForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import LLAMA, PARTIAL, ROTARY, WINDOWS, kin_config, kin_target, sight, window_by_layer
from .maps import Architecture


SMOLLM3 = LLAMA.varied("SmolLM3")


def rigpt_config(config: SmolLM3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a SmolLM3; see [`Architecture.result`] and [`kin_config`]."""
    # The list may be longer than the model.
    turned = list(config.no_rope_layers[: config.num_hidden_layers])
    return kin_config(SMOLLM3, config, no_rope_layers=None if all(turned) else turned, **sight(config, True))


def layers_of(config: RiGPTConfig) -> dict[str, Any]:
    """The fields that say how far back layers see, and which of them positions turn."""
    # None would be every fourth layer but these.
    return {**window_by_layer(config), "no_rope_layers": config.no_rope_layers or [1] * config.num_hidden_layers}


ARCHITECTURES = {"smollm3": Architecture("SmolLM3ForCausalLM", SMOLLM3, rigpt_config, PARTIAL)}
TARGETS = {
    "smollm3": kin_target(
        SmolLM3ForCausalLM,
        SMOLLM3,
        f"{ROTARY} in some layers or all, a gated MLP, no q/k normalisation",
        {"no_rope_layers": None, **WINDOWS},
        windows=layers_of,
    )
}
