"""Models, configurations and tokenizers by what a person calls them: a folder, or an id on the Hub."""

from typing import Any

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .read import load_config, load_model


def load(source: str, dtype: Any = None, *, argument: str = "source", revision: str | None = None) -> Any:
    """A causal language model from a folder or the Hub, in evaluation mode."""
    model = load_model(source, argument=argument, revision=revision, dtype=dtype or "auto", allow_unexpected=True)
    return model.eval()


def rigpt_config(source: str, revision: str | None = None) -> Any:
    """The configuration of a RiGPT; a `ValueError` that says what to do if `source` is anything else."""
    return check_rigpt(load_config(source, revision=revision), source)


def check_rigpt(config: Any, source: str) -> RiGPTConfig:
    """
    `config` itself, if it is that of a RiGPT with a head for language modeling.

    Raises:
        ValueError: if it is not; the message says what to do with `source`.
    """
    if not isinstance(config, RiGPTConfig):
        raise ValueError(
            f"`source` must be a RiGPT, got {source!r} of model type {config.model_type!r}. Convert it first: "
            f"rigpt convert {source} OUTPUT"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"`source` must hold its weights themselves and no codes for them, got {source!r} with a "
            "`quantization_config`. Give the model that was quantized, or export codes of rigpt with `--to gguf` or "
            "`--to compressed-tensors`."
        )
    architectures = config.architectures or [RiGPTForCausalLM.__name__]
    if RiGPTForCausalLM.__name__ not in architectures:
        raise ValueError(
            f"`source` must be a {RiGPTForCausalLM.__name__}, got {source!r}, which is a {architectures[0]}. Give the "
            "language model it was made from, or transform it in memory with `GaugeTransformation`."
        )
    return config


def load_rigpt(source: str, dtype: Any = None, revision: str | None = None) -> Any:
    """
    A `RiGPTForCausalLM` from a folder or the Hub, in evaluation mode.

    Args:
        source: Folder or Hub id.
        dtype (`torch.dtype`, *optional*): To load as; as saved if not given.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: if it is not a RiGPT, or its weights are not those that its configuration asks for.
    """
    rigpt_config(source, revision)
    return load_model(source, RiGPTForCausalLM, dtype=dtype or "auto", revision=revision).eval()
