"""The Llama family (Llama, Mistral, Qwen2): one weight map, and what each option of their configurations becomes."""

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.utils import logging

from ..configuration_rigpt import RiGPTConfig
from .activations import rigpt_activation
from .maps import Family, Role, Rule


logger = logging.get_logger(__name__)

_L = "model.layers.{i}"
_ATTENTION_NORM = f"{_L}.input_layernorm"
_MLP_NORM = f"{_L}.post_attention_layernorm"

LLAMA = Family(
    name="the Llama family",
    prefix="model.",
    rules=(
        Rule("model.embed_tokens", Role.COPY, "model.embed_tokens"),
        Rule(f"{_L}.self_attn.q_proj", Role.READER, f"{_L}.self_attn.q_proj", _ATTENTION_NORM, is_query=True),
        Rule(f"{_L}.self_attn.k_proj", Role.READER, f"{_L}.self_attn.k_proj", _ATTENTION_NORM),
        Rule(f"{_L}.self_attn.v_proj", Role.READER, f"{_L}.self_attn.v_proj", _ATTENTION_NORM),
        Rule(f"{_L}.self_attn.o_proj", Role.WRITER, f"{_L}.self_attn.o_proj"),
        Rule(f"{_L}.mlp.gate_proj", Role.READER, f"{_L}.mlp.gate_proj", _MLP_NORM),
        Rule(f"{_L}.mlp.up_proj", Role.READER, f"{_L}.mlp.up_proj", _MLP_NORM),
        Rule(f"{_L}.mlp.down_proj", Role.WRITER, f"{_L}.mlp.down_proj"),
    ),
    # A shared table cannot take over the last gain, so two small projections do; a head of its own can.
    tied_rules=(
        Rule("model.project_in", Role.INJECTION),
        Rule("model.project_out", Role.EXTRACTION, norm="model.norm"),
    ),
    untied_rules=(Rule("lm_head", Role.READER, "lm_head", "model.norm"),),
    final_norm="model.norm",
    head="lm_head",
    embedding="model.embed_tokens",
    # RMSNorm subtracts no mean; centring the stream of such a model changes the function.
    centred=False,
    norm_bias=False,
    transposed=(),
    # Frequencies of the rotation, which checkpoints of older releases stored; they follow from the configuration.
    harmless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    query_scale=lambda config, layer: 1.0,
)


def rigpt_config(config: PreTrainedConfig, dropout: str = "vector") -> RiGPTConfig:
    """
    The configuration of the RiGPT equal to a Llama, Mistral or Qwen2.

    Args:
        config (`PreTrainedConfig`): the source's configuration.
        dropout (`str`, defaults to `"vector"`): unused; the family has no dropout but that of probabilities.

    Raises:
        ValueError: if an option of the source has no exact form; the message names it.
    """
    _refuse_sliding_window(config)
    rope = dict(config.rope_parameters)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"`rope_parameters['partial_rotary_factor']={rope['partial_rotary_factor']}` is not honoured by "
            f"`{config.model_type}` models, which turn whole heads, but would be by RiGPT. Remove it from the "
            "source's configuration if its heads are turned whole."
        )
    qkv_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    tied = config.tie_word_embeddings
    return RiGPTConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.hidden_size if tied else None,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden_act=rigpt_activation(config.hidden_act, "hidden_act"),
        gated_mlp=True,
        attention_bias=qkv_bias,
        attention_output_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        position_embedding_type="rotary",
        rope_parameters=rope,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        attention_dropout=config.attention_dropout or 0.0,
        tie_word_embeddings=tied,
        use_cache=config.use_cache,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _refuse_sliding_window(config: PreTrainedConfig) -> None:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = window is not None if layer_types is None else "sliding_attention" in layer_types
    # A window as long as the longest sequence hides nothing.
    if slides and (window is None or window < config.max_position_embeddings):
        raise ValueError(
            f"`sliding_window={window}` is shorter than `max_position_embeddings={config.max_position_embeddings}`: "
            "these layers do not see everything before them, and RiGPT's do. If you only use sequences no longer than "
            "the window, set `max_position_embeddings` to it (or `sliding_window=None`) in the source's configuration."
        )


def stock_config(config: RiGPTConfig, qwen2: bool = False) -> LlamaConfig | Qwen2Config:
    """
    The configuration of the Llama or Qwen2 equal to a RiGPT, but for `tie_word_embeddings`, which the weights decide.

    Args:
        config (`RiGPTConfig`): the source's configuration.
        qwen2 (`bool`, defaults to `False`): Qwen2 (biases on q, k, v alone) instead of Llama.

    Raises:
        ValueError: if the target cannot express an option; the message names it.
    """
    target = "Qwen2" if qwen2 else "Llama"
    for field, possible in (
        ("position_embedding_type", config.position_embedding_type == "rotary"),
        ("rotary_learned_frequencies", not config.rotary_learned_frequencies),
        ("gated_mlp", config.gated_mlp),
        ("qk_norm", not config.qk_norm),
        ("attention_output_bias", not (qwen2 and config.attention_output_bias)),
        ("mlp_bias", not (qwen2 and config.mlp_bias)),
    ):
        if not possible:
            raise ValueError(
                f"`{field}={getattr(config, field)!r}` has no counterpart in {target}, which has rotary positions "
                "with fixed frequencies, a gated MLP, no q/k normalisation"
                + (" and biases on q, k and v alone. Try `target='llama'`." if qwen2 else ". Try `target='gpt2'`.")
            )
    if config.residual_dropout or config.embedding_dropout:
        logger.warning(
            f"`residual_dropout={config.residual_dropout}` and `embedding_dropout={config.embedding_dropout}` have no "
            f"counterpart in {target} and were set to 0. Evaluation is unaffected; training differs."
        )
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": dict(config.rope_parameters or {}),
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "attention_dropout": config.attention_dropout,
        "use_cache": config.use_cache,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if qwen2:
        return Qwen2Config(**common)
    biased = config.attention_bias or config.attention_output_bias
    return LlamaConfig(**common, attention_bias=biased, mlp_bias=config.mlp_bias)
