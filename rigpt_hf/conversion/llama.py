"""The Llama family (Llama, Mistral, Ministral, Qwen2): one weight map, and what each option of them becomes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import (
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ..configuration_rigpt import RiGPTConfig
from ..layers_rigpt import FULL, SLIDING, by_layer_type
from .activations import rigpt_activation
from .dropout import stock_dropouts
from .maps import Architecture, Family, Rule, Target, same


Expressed = dict[str, Callable[[RiGPTConfig], bool] | None]
_L = "model.layers.{i}"
_ATTENTION_NORM = f"{_L}.input_layernorm"
_MLP_NORM = f"{_L}.post_attention_layernorm"

ATTENTION_BIASES = dict.fromkeys(("attention_bias", "attention_output_bias"), "attention_bias")

LLAMA = Family(
    name="the Llama family",
    prefix="model.",
    rules=(
        Rule("model.embed_tokens", "model.embed_tokens"),
        Rule(f"{_L}.self_attn.q_proj", f"{_L}.self_attn.q_proj", _ATTENTION_NORM),
        Rule(f"{_L}.self_attn.k_proj", f"{_L}.self_attn.k_proj", _ATTENTION_NORM),
        Rule(f"{_L}.self_attn.v_proj", f"{_L}.self_attn.v_proj", _ATTENTION_NORM),
        Rule(f"{_L}.self_attn.o_proj", f"{_L}.self_attn.o_proj"),
        Rule(f"{_L}.mlp.gate_proj", f"{_L}.mlp.gate_proj", _MLP_NORM),
        Rule(f"{_L}.mlp.up_proj", f"{_L}.mlp.up_proj", _MLP_NORM),
        Rule(f"{_L}.mlp.down_proj", f"{_L}.mlp.down_proj"),
        # A shared table cannot take over the last gain, so two small projections do; a head of its own can.
        Rule("model.project_in"),
        Rule("model.project_out", norm="model.norm"),
        Rule("lm_head", "lm_head", "model.norm"),
    ),
    fields=same(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "attention_dropout",
        "rms_norm_eps",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ),
    final_norm="model.norm",
    head="lm_head",
    embedding="model.embed_tokens",
    # RMSNorm subtracts no mean; centring the stream of such a model changes the function.
    centred=False,
    norm_bias=False,
    # Frequencies of the rotation, which checkpoints of older releases stored; they follow from the configuration.
    harmless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    options=ATTENTION_BIASES | same("mlp_bias"),
)
# Classes whose biases are no options.
UNBIASED = LLAMA.varied(LLAMA.name, options={})


def rigpt_config(config: PreTrainedConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The configuration of the RiGPT equal to a Llama; see [`Architecture.result`]."""
    return kin_config(LLAMA, config)


def mistral_config(config: PreTrainedConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Mistral, of which all layers slide or none."""
    return kin_config(UNBIASED, config, **sight(config, False))


def ministral_config(config: PreTrainedConfig, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Ministral, some of whose layers slide."""
    return kin_config(UNBIASED, config, **sight(config, True))


def qwen2_rigpt_config(config: Qwen2Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Qwen2, whose queries, keys and values have biases."""
    return kin_config(UNBIASED, config, attention_bias=True, **sight(config, True))


def ministral3_config(config: Ministral3Config, dropout: str | None = "vector") -> RiGPTConfig:
    """The same for a Ministral 3, whose queries are not scaled at the positions that it has."""
    # The first of them does nothing there, and the library leaves the other unread.
    others = ("llama_4_scaling_beta", "max_position_embeddings")
    rope = {name: value for name, value in config.rope_parameters.items() if name not in others}
    return kin_config(UNBIASED, config, rope_parameters=rope, **sight(config, False))


def kin_config(family: Family, config: PreTrainedConfig, activation: str = "hidden_act", **own: Any) -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a model with Llama's layers.

    Args:
        family (`Family`): the source's.
        config (`PreTrainedConfig`): the source's configuration, of which the fields are read that the family names.
        activation (`str`): what the source calls its activation.
        own: fields of the result that do not follow from Llama's names.

    Raises:
        ValueError: if the activation is none that RiGPT has.
    """
    same_as_llama = {
        "embedding_size": config.hidden_size if config.tie_word_embeddings else None,
        "head_dim": head_dim(config),
        "hidden_act": rigpt_activation(getattr(config, activation), activation),
        "gated_mlp": True,
        "position_embedding_type": "rotary",
        "rope_parameters": rotations(config),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return RiGPTConfig(**family.rigpt_fields(config) | same_as_llama | own)


def head_dim(config: PreTrainedConfig) -> int:
    """Dimensions per head, as these classes read it: many configurations lack the field, and may be given one."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotations(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope parameters of a source, of its types of layers if it has several."""
    rope = config.rope_parameters
    if not by_layer_type(rope):
        return dict(rope)
    kinds = dict.fromkeys(config.layer_types[: config.num_hidden_layers])
    own = {kind: dict(rope[kind]) for kind in kinds}
    return own if len(kinds) > 1 else own.popitem()[1]


def sight(config: PreTrainedConfig, layered: bool) -> dict[str, Any]:
    """
    The fields of a RiGPT whose layers see as far back as those of a source.

    Args:
        config (`PreTrainedConfig`): the source's configuration.
        layered (`bool`): the class slides in those layers alone that `layer_types` says; others never read that, and
            slide in all if there is a window.
    """
    window = config.sliding_window
    kinds = list(config.layer_types[: config.num_hidden_layers]) if layered else None
    slides = window is not None if kinds is None else SLIDING in kinds
    # However long the window is: rotary positions go on beyond the length that a model is made for.
    return {"layer_types": kinds, "sliding_window": window} if slides else {}


def turns_whole_heads(rope: Mapping[str, Any]) -> bool:
    """
    Whether no part of a head is left out, and none of another type of layer turns otherwise; the proportional rotation
    turns that part too, by nothing.
    """
    if by_layer_type(rope):
        return False
    return rope.get("partial_rotary_factor", 1.0) == 1.0 or rope.get("rope_type") == "proportional"


def partial_rotation(config: PreTrainedConfig) -> str | None:
    """Heads turned in part, of a class that turns them whole whatever its configuration says."""
    rope = rotations(config)
    partial = [each for each in (rope.values() if by_layer_type(rope) else [rope]) if not turns_whole_heads(each)]
    if not partial:
        return None
    part = partial[0]["partial_rotary_factor"]
    return (
        f"`rope_parameters['partial_rotary_factor']={part}` is not honoured by `{config.model_type}` models, which "
        "turn whole heads, but would be by RiGPT. Remove it from the source's configuration if its heads are turned "
        "whole."
    )


def scaled_queries(config: Ministral3Config) -> str | None:
    """Queries scaled by their position, from some position on."""
    rope, longest = config.rope_parameters, config.max_position_embeddings
    beta, first = rope.get("llama_4_scaling_beta", 0.0), rope.get("original_max_position_embeddings", longest)
    if not beta or longest <= first:
        return None
    return (
        f"`rope_parameters['llama_4_scaling_beta']={beta}` scales queries from position {first} on, and "
        f"`max_position_embeddings={longest}`: RiGPT's queries do not know where they are. If you only use sequences "
        f"up to {first}, set `max_position_embeddings` to {first} in the source's configuration."
    )


def kin_target(
    model_class: Any,
    family: Family,
    summary: str,
    expresses: Mapping[str, Callable[[RiGPTConfig], bool] | None] | None = None,
    constants: Mapping[str, float] | None = None,
    windows: Callable[[RiGPTConfig], dict[str, Any]] | None = None,
    activation: str = "hidden_act",
    dropouts: Sequence[str] = (),
    variant: Callable[[Any], Family] | None = None,
    **own: Any,
) -> Target:
    """
    A class with Llama's layers to export to. It has what the options of its family name.

    Args:
        model_class (`type`): the class.
        family (`Family`): its weight map.
        summary (`str`), constants: see [`Target`].
        expresses: options for which it differs from Llama, see [`Target`].
        windows (`Callable`, *optional*): the fields of its configuration that say how far back layers see.
        activation (`str`, defaults to `"hidden_act"`): what its configuration calls the activation.
        dropouts (`Sequence[str]`, *optional*): what it calls the probabilities that `residual_dropout` and
            `embedding_dropout` are in it; as many as it has.
        variant (`Callable`, *optional*): see [`Target`].
        own: fields of its configuration that do not follow from Llama's names, or functions of ours that give them.
    """
    name = model_class.__name__.removesuffix("ForCausalLM")

    def stock_config(config: RiGPTConfig) -> PreTrainedConfig:
        options: dict[str, Any] = stock_dropouts(config, name, dropouts)
        for ours, theirs in family.options.items():
            # One option for several biases: those that are absent are 0.
            options[theirs] = options.get(theirs) or getattr(config, ours)
        if windows is not None:
            options |= windows(config)
        same_as_llama = {
            "head_dim": config.head_dim,
            activation: config.hidden_act,
            "rope_parameters": dict(config.rope_parameters or {}),
        }
        others = {field: value(config) if callable(value) else value for field, value in own.items()}
        return model_class.config_class(**family.stock_fields(config) | options | same_as_llama | others)

    options = _EXPRESSES | dict.fromkeys(family.options) | dict(expresses or {})
    return Target(name, model_class, family, options, stock_config, summary, constants or {}, variant)


def one_window(config: RiGPTConfig) -> dict[str, Any]:
    """The window of a class of which all layers slide or none."""
    return {"sliding_window": config.sliding_window}


def window_by_layer(config: RiGPTConfig) -> dict[str, Any]:
    """The window of a class with a list of the layers that slide."""
    slides = config.sliding_window is not None
    return {"use_sliding_window": slides, "sliding_window": config.sliding_window, "layer_types": config.layer_types}


def layers_in_sight(config: RiGPTConfig) -> dict[str, Any]:
    """The same of a class that always has such a list, and makes a mask of a window whether or not a layer slides."""
    window = config.sliding_window or config.max_position_embeddings
    return {"sliding_window": window, "layer_types": config.layer_types or [FULL] * config.num_hidden_layers}


def in_part(config: RiGPTConfig) -> dict[str, Any]:
    """Rope parameters for a class that turns part of every head where nothing is said of it."""
    return {"partial_rotary_factor": 1.0} | dict(config.rope_parameters or {})


def by_type(config: RiGPTConfig) -> dict[str, Any]:
    """Rope parameters for a class that has them for both types of layers."""
    rope = config.rope_parameters or {}
    return dict(rope) if by_layer_type(rope) else {kind: dict(rope) for kind in (FULL, SLIDING)}


def heads_share_stream(config: RiGPTConfig) -> bool:
    """Whether heads are as large as in classes whose configuration does not say how large they are."""
    return config.num_attention_heads * config.head_dim == config.hidden_size


def beta_of_zero(config: RiGPTConfig) -> dict[str, Any]:
    """Rope parameters for a Ministral 3 that does not scale its queries."""
    first = {"original_max_position_embeddings": config.max_position_embeddings}
    return first | dict(config.rope_parameters or {}) | {"llama_4_scaling_beta": 0.0}


PARTIAL = {"rope_parameters['partial_rotary_factor']": partial_rotation}
_SCALED = {"rope_parameters['llama_4_scaling_beta']": scaled_queries}
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", LLAMA, rigpt_config, PARTIAL),
    "mistral": Architecture("MistralForCausalLM", UNBIASED, mistral_config, PARTIAL),
    "ministral": Architecture("MinistralForCausalLM", UNBIASED, ministral_config, PARTIAL),
    "ministral3": Architecture("Ministral3ForCausalLM", UNBIASED, ministral3_config, PARTIAL | _SCALED),
    "qwen2": Architecture("Qwen2ForCausalLM", UNBIASED, qwen2_rigpt_config, PARTIAL),
}
# Options that all of the family can express.
_EXPRESSES: Expressed = {
    "gated_mlp": lambda config: config.gated_mlp,
    # Which turn whole heads, whatever their configuration says.
    "rope_parameters": lambda config: turns_whole_heads(config.rope_parameters or {}),
    "head_dim": None,
    "hidden_act": None,
    # Nothing but the tables of tokens is in front of the first layer, and `choose_frame` puts the norm into them.
    "embedding_norm": None,
    # The weights say whether it is 0.
    "output_bias": None,
}
UNGATED: Expressed = {"gated_mlp": lambda config: not config.gated_mlp}
ROTARY = "rotary positions with fixed frequencies for whole heads"
_SUMMARY = f"{ROTARY}, a gated MLP, no q/k normalisation"
# For `expresses` of a class with windows.
ONE_WINDOW: Expressed = {
    "sliding_window": None,
    "layer_types": lambda config: FULL not in (config.layer_types or ()),
}
WINDOWS: Expressed = dict.fromkeys(ONE_WINDOW)
# And of one that turns part of every head, that has rope parameters by type of layer, or LayerNorms with biases.
IN_PART: Expressed = {
    "rope_parameters": lambda config: not by_layer_type(config.rope_parameters),
}
BY_TYPE: Expressed = {
    "rope_parameters": lambda config: all(turns_whole_heads(rope) for rope in by_type(config).values()),
}
BIASES: Expressed = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"))
TARGETS = {
    "llama": kin_target(LlamaForCausalLM, LLAMA, _SUMMARY),
    "mistral": kin_target(
        MistralForCausalLM, UNBIASED, f"{_SUMMARY}, one window and no biases", ONE_WINDOW, windows=one_window
    ),
    "qwen2": kin_target(
        Qwen2ForCausalLM,
        UNBIASED,
        f"{_SUMMARY} and biases on q, k and v alone",
        {"attention_bias": None} | WINDOWS,
        windows=window_by_layer,
    ),
    "ministral": kin_target(
        MinistralForCausalLM, UNBIASED, f"{_SUMMARY} and no biases", WINDOWS, windows=layers_in_sight
    ),
    "ministral3": kin_target(
        Ministral3ForCausalLM,
        UNBIASED,
        f"{_SUMMARY}, one window and no biases",
        ONE_WINDOW,
        windows=one_window,
        rope_parameters=beta_of_zero,
    ),
}
