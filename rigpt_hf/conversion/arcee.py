"""Arcee: Llama's weight map with an ungated MLP, whose activation is ReLU²."""

from transformers import ArceeConfig, ArceeForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .llama import LLAMA, PARTIAL, ROTARY, UNGATED, kin_config, kin_target
from .maps import Architecture


ARCEE = LLAMA.varied("Arcee")


def rigpt_config(config: ArceeConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to an Arcee; see [`kin_config`]."""
    return kin_config(ARCEE, config, gated_mlp=False)


ARCHITECTURES = {"arcee": Architecture("ArceeForCausalLM", ARCEE, rigpt_config, PARTIAL)}
TARGETS = {
    "arcee": kin_target(ArceeForCausalLM, ARCEE, f"{ROTARY}, an ungated MLP, no q/k normalisation", UNGATED),
}
