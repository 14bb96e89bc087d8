"""The stock architectures that convert, and those to export to; a family is one file, and stands in `FAMILIES`."""

from typing import Any

from transformers import PreTrainedConfig

from . import (
    apertus,
    arcee,
    bloom,
    cohere,
    ernie4_5,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    moe,
    mpt,
    nanochat,
    olmo,
    olmo2,
    olmoe,
    opt,
    persimmon,
    phi,
    phi3,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
)
from .maps import Architecture, Target


FAMILIES = (
    gpt2,
    llama,
    arcee,
    apertus,
    ernie4_5,
    gemma,
    glm,
    gpt_neo,
    granite,
    moe,
    nanochat,
    olmo,
    olmo2,
    olmoe,
    gpt_oss,
    opt,
    phi3,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
    gpt_neox,
    gptj,
    phi,
    persimmon,
    falcon,
    cohere,
    mpt,
    bloom,
)
# By `model_type`, and by the name that a target is asked for.
ARCHITECTURES: dict[str, Architecture] = {
    name: architecture for family in FAMILIES for name, architecture in getattr(family, "ARCHITECTURES", {}).items()
}
TARGETS: dict[str, Target] = {
    name: target for family in FAMILIES for name, target in getattr(family, "TARGETS", {}).items()
}

REASONS = {
    "apertus": "its activation has numbers of its own to learn; a RiGPT is exported to it as ReLU², one way",
    "rigpt": "it is a RiGPT already",
    "bitnet": "it rounds activations coordinate by coordinate, which prefers a basis",
    "hunyuan_v1_dense": "its queries and keys have gains behind their rotation",
    "llama4_text": "its router scales what experts read",
    "qwen3_next": "three of four of its layers are no attention",
}


def refuse_adapter(model: Any, argument: str) -> None:
    """Raise a `ValueError` for a model that PEFT has wrapped, or has put its layers into."""
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{argument}` must be a model without adapters, got a {type(model).__name__} with some. Merge them "
            "first: `merge_and_unload` of the `PeftModel`."
        )


def architecture_of(config: PreTrainedConfig, class_name: str | None = None) -> Architecture:
    """
    The entry of the table for a stock configuration.

    Args:
        config (`PreTrainedConfig`): the source's configuration.
        class_name (`str`, *optional*): the class of a model in memory, checked too.

    Raises:
        ValueError: for an architecture that is not in the table, or a quantized checkpoint.
    """
    supported = [entry.class_name for entry in ARCHITECTURES.values()]
    entry = ARCHITECTURES.get(config.model_type)
    if entry is None:
        reason = REASONS.get(config.model_type, "no weight map has been written for it")
        raise ValueError(
            f"`model_type={config.model_type!r}` cannot be converted: {reason}. `rigpt families` lists the "
            f"{len(supported)} that can."
        )
    if class_name is not None and class_name != entry.class_name:
        raise ValueError(
            f"`hf_model` must be one of {', '.join(supported)}, got {class_name}. Load the checkpoint with "
            f"`{entry.class_name}.from_pretrained`."
        )
    quantization = getattr(config, "quantization_config", None)
    # A decoded GGUF keeps the record of where it came from, and plain weights.
    if quantization is not None and not getattr(quantization, "dequantize", False):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"`quantization_config` ({method}) must be absent: folding needs the weights themselves, not codes for "
            "them. Dequantize the model (`model.dequantize()`) or start from the checkpoint before quantization."
        )
    return entry
