"""GPT-Neo and TinyStories: GPT-2's network with separate maps, scores that are not scaled, and layers that slide."""

from transformers import GPTNeoConfig, GPTNeoForCausalLM

from ..configuration_rigpt import RiGPTConfig
from ..layers_rigpt import FULL, SLIDING
from .activations import rigpt_activation, stock_activation
from .dropout import stock_dropouts, vector_dropout
from .gpt2 import GPT2, GPT2_OPTIONS
from .maps import NORM_BIASES, Architecture, Target


_ATTENTION, _MLP = "transformer.h.{i}.attn.attention", "transformer.h.{i}.mlp"
_PLAIN = {"rows": None, "transposed": False}
_NO_BIAS = {"bias": lambda config: False}

GPT_NEO = GPT2.varied(
    "GPT-Neo",
    {
        "q_proj": {
            **_PLAIN,
            **_NO_BIAS,
            "source": f"{_ATTENTION}.q_proj",
            "scale": lambda config, layer: (config.hidden_size // config.num_heads) ** 0.5,
        },
        "k_proj": _PLAIN | _NO_BIAS | {"source": f"{_ATTENTION}.k_proj"},
        "v_proj": _PLAIN | _NO_BIAS | {"source": f"{_ATTENTION}.v_proj"},
        "o_proj": _PLAIN | {"source": f"{_ATTENTION}.out_proj"},
        "up_proj": _PLAIN | {"source": f"{_MLP}.c_fc"},
        "down_proj": _PLAIN | {"source": f"{_MLP}.c_proj"},
    },
    fields={
        **GPT2.fields,
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_position_embeddings",
        "attention_dropout": "attention_dropout",
    },
    # The causal mask, which checkpoints of older releases stored.
    harmless=(r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",),
)


def rigpt_config(config: GPTNeoConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a GPT-Neo; see [`Architecture.result`]."""
    names = ("resid_dropout", "embed_dropout")
    residual, embedding = vector_dropout({name: getattr(config, name) for name in names}, dropout)
    # A window as long as the longest sequence hides nothing.
    types = [SLIDING if kind == "local" else FULL for kind in config.attention_layers[: config.num_layers]]
    slides = SLIDING in types and config.window_size < config.max_position_embeddings
    return RiGPTConfig(
        **GPT_NEO.rigpt_fields(config),
        **NORM_BIASES,
        embedding_size=config.hidden_size,
        hidden_act=rigpt_activation(config.activation_function, "activation_function"),
        attention_output_bias=True,
        position_embedding_type="learned",
        layer_types=types if slides else None,
        sliding_window=config.window_size if slides else None,
        residual_dropout=residual,
        embedding_dropout=embedding,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def stock_config(config: RiGPTConfig) -> GPTNeoConfig:
    """The configuration of the GPT-Neo equal to a RiGPT, but for `tie_word_embeddings`."""
    kinds = [
        "local" if kind == SLIDING else "global" for kind in config.layer_types or [FULL] * config.num_hidden_layers
    ]
    return GPTNeoConfig(
        **GPT_NEO.stock_fields(config),
        **stock_dropouts(config, GPT_NEO.name, ("resid_dropout", "embed_dropout")),
        attention_types=[[kinds, 1]],
        window_size=config.sliding_window or config.max_position_embeddings,
        activation_function=stock_activation(config.hidden_act),
    )


ARCHITECTURES = {"gpt_neo": Architecture("GPTNeoForCausalLM", GPT_NEO, rigpt_config)}
TARGETS = {
    "gpt_neo": Target(
        name=GPT_NEO.name,
        model_class=GPTNeoForCausalLM,
        family=GPT_NEO,
        expresses={**GPT2_OPTIONS, "layer_types": None, "sliding_window": None},
        stock_config=stock_config,
        summary="learned positions, an ungated MLP, as many key-value heads as heads and no q/k normalisation",
    )
}
