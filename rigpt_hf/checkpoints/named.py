"""Models, configurations and tokenizers by what a person calls them: a folder, or an id on the Hub."""

import json
import logging
from typing import Any

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .read import load_config, load_model, load_tokenizer


logger = logging.getLogger(__name__)


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
            "`quantization_config`. Give the model that was quantized."
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


def check_comparable(a: str, b: str):
    """Raise a `ValueError` if two models cannot be given the same tokens; no weights are read."""
    sizes = [load_config(source).vocab_size for source in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`a` and `b` must have one vocabulary, got {sizes[0]} tokens in {a!r} and {sizes[1]} in {b!r}. Compare "
            "a model with what was made from it."
        )


def check_same_vocabulary(a: str, b: str):
    """
    Raise a `ValueError` if the tokens of two models mean different things: vocabularies of two sizes, or, where both
    have a tokenizer, one token with two ids, or other merges. No weights are read. That one has none that loads
    is said, and no error.
    """
    check_comparable(a, b)
    try:
        first, second = load_tokenizer(a), load_tokenizer(b)
    except ValueError:
        logger.warning(
            f"Whether the tokens of {a!r} and {b!r} mean the same was not checked: not both have a tokenizer that "
            "loads here."
        )
        return
    advice = "Take two models that were made with one tokenizer; tokens of one id must mean the same in both."
    ids, others = first.get_vocab(), second.get_vocab()
    differing = sorted(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
    if differing:
        token = differing[0]
        places = [f"id {table[token]}" if token in table else "absent" for table in (ids, others)]
        raise ValueError(
            f"`a` and `b` must have one tokenizer, got two that differ in {len(differing)} tokens, such as {token!r}: "
            f"{places[0]} in {a!r}, {places[1]} in {b!r}. {advice}"
        )
    if merges_of(first) != merges_of(second):
        raise ValueError(
            f"`a` and `b` must have one tokenizer, got two that merge characters differently, in {a!r} and {b!r}. "
            f"{advice}"
        )


def merges_of(tokenizer: Any) -> Any:
    """The merges of a byte-pair tokenizer; `None` for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")
