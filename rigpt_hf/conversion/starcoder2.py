"""StarCoder2: Llama's weight map with LayerNorms and an MLP without gates."""

from transformers import Starcoder2Config, Starcoder2ForCausalLM

from ..configuration_rigpt import RiGPTConfig
from .dropout import vector_dropout
from .llama import BIASES, LLAMA, ONE_WINDOW, PARTIAL, ROTARY, UNGATED, kin_config, kin_target, one_window, sight
from .maps import NORM_BIASES, Architecture


_BIAS = {"bias": lambda config: config.use_bias}
_MLP = "model.layers.{i}.mlp"

STARCODER2 = LLAMA.varied(
    "StarCoder2",
    {
        "q_proj": _BIAS,
        "k_proj": _BIAS,
        "v_proj": _BIAS,
        "gate_proj": None,
        "up_proj": _BIAS | {"source": f"{_MLP}.c_fc"},
        "down_proj": _BIAS | {"source": f"{_MLP}.c_proj"},
        # The last norm has a bias, and the head has none that could take it over.
        "lm_head": {"norm": None},
    },
    fields={**LLAMA.fields, "rms_norm_eps": "norm_epsilon"},
    centred=True,
    norm_bias=True,
    options={"attention_output_bias": "use_bias"},
)


def rigpt_config(config: Starcoder2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a StarCoder2; see [`Architecture.result`] and [`kin_config`]."""
    names = ("residual_dropout", "embedding_dropout")
    residual, embedding = vector_dropout({name: getattr(config, name) for name in names}, dropout)
    return kin_config(
        STARCODER2,
        config,
        **NORM_BIASES,
        embedding_size=config.hidden_size,
        gated_mlp=False,
        residual_dropout=residual,
        embedding_dropout=embedding,
        **sight(config, False),
    )


ARCHITECTURES = {"starcoder2": Architecture("Starcoder2ForCausalLM", STARCODER2, rigpt_config, PARTIAL)}
TARGETS = {
    "starcoder2": kin_target(
        Starcoder2ForCausalLM,
        STARCODER2,
        f"{ROTARY}, LayerNorms, an ungated MLP, one window, no q/k normalisation",
        UNGATED | BIASES | ONE_WINDOW,
        windows=one_window,
        dropouts=("residual_dropout", "embedding_dropout"),
    )
}
