"""ERNIE 4.5 (dense): Llama's weight map, where a rotation turns neighbouring dimensions together."""

from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

from ..checkpoints.weights import Rows
from ..configuration_rigpt import RiGPTConfig
from .llama import LLAMA, PARTIAL, ROTARY, head_dim, kin_config, kin_target
from .maps import Architecture


def interleaved(config: Ernie4_5Config) -> Rows:
    """The rows of each head, as pairs of neighbours."""
    size = head_dim(config)
    return Rows(0, size, size, interleaved=size)


ERNIE = LLAMA.varied(
    "ERNIE 4.5",
    {"q_proj": {"rows": interleaved}, "k_proj": {"rows": interleaved}},
    # It drops nothing, in training either.
    fields={ours: theirs for ours, theirs in LLAMA.fields.items() if ours != "attention_dropout"},
    options=dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), "use_bias"),
)


def rigpt_config(config: Ernie4_5Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a dense ERNIE 4.5; see [`kin_config`]."""
    return kin_config(ERNIE, config)


ARCHITECTURES = {"ernie4_5": Architecture("Ernie4_5ForCausalLM", ERNIE, rigpt_config, PARTIAL)}
TARGETS = {"ernie4_5": kin_target(Ernie4_5ForCausalLM, ERNIE, f"{ROTARY}, a gated MLP, no q/k normalisation")}
