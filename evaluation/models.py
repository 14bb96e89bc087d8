"""A model under evaluation: a causal language model, with its tokenizer if it reads text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rigpt_hf.checkpoints.companions import plain_generation
from rigpt_hf.checkpoints.read import load_model, load_tokenizer


# Texts, or rows of token ids.
Texts = Sequence[str] | Sequence[Sequence[int]]
# Tokens of a window where neither the caller nor the model's configuration says how many.
DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class EvaluatedModel:
    """
    A model and its tokenizer.

    Args:
        model: A causal language model in evaluation mode: called with `input_ids`, `attention_mask` and
            `position_ids`, it gives `logits`.
        tokenizer: Of the model; `None` if it reads rows of token ids only.
        name (`str`): What to call it in a message or table.
        source (`str`): Folder or Hub id that it comes from, if any.
    """

    model: Any
    tokenizer: Any = None
    name: str = ""
    source: str = ""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return torch.device(getattr(self.model, "device", "cpu"))

    @property
    def config(self) -> Any:
        """Its configuration; `None` if it has none."""
        return getattr(self.model, "config", None)

    @property
    def positions(self) -> int | None:
        """The longest row it takes, as far as its configuration says."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def begins_texts(self) -> bool:
        """Whether the tokenizer by itself begins texts with a token of its own, as Llama's does."""
        start = getattr(self.tokenizer, "bos_token_id", None)
        if start is None:
            return False
        whole, bare = (self.tokenizer("a", add_special_tokens=wanted)["input_ids"] for wanted in (True, False))
        return whole[:1] == [start] and len(whole) > len(bare)

    @property
    def first_token(self) -> int | None:
        """The id of the token that texts begin with (GPT-2's end-of-text serves as that too); `None` without one."""
        size = getattr(self.config, "vocab_size", None)
        for source in (self.tokenizer, self.config):
            for name in ("bos_token_id", "eos_token_id"):
                value = getattr(source, name, None)
                if isinstance(value, int) and (size is None or 0 <= value < size):
                    return value
        return None

    def beginning(self) -> int:
        """
        [`first_token`].

        Raises:
            ValueError: if neither the tokenizer nor the configuration knows one that the model has a row for.
        """
        if self.first_token is None:
            raise ValueError("`bos` needs a token that texts begin with, and the tokenizer has none. Leave it out.")
        return self.first_token

    def context(self, wanted: int | None) -> int:
        """
        Tokens of a window.

        Raises:
            ValueError: if `wanted` is not positive or more than the model takes.
        """
        most = self.positions
        if wanted is None:
            return min(most or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if wanted < 1:
            raise ValueError(f"`context` must be at least 1, got {wanted}.")
        if most is not None and wanted > most:
            raise ValueError(
                f"`context` must be at most the {most} positions of {self.name or 'the model'}, got {wanted}."
            )
        return wanted

    def encode(self, texts: Texts, argument: str = "predictions") -> list[list[int]]:
        """
        Rows of token ids: those given, or those of texts, without special tokens.

        Raises:
            ValueError: if there is nothing, or text without a tokenizer, or an id that the model has no row for.
        """
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"`{argument}` must be a list of texts or of rows of token ids, got {texts!r:.40}.")
        if isinstance(texts[0], str):
            if self.tokenizer is None:
                raise ValueError(
                    f"`tokenizer` is needed to read text, and {self.name or 'the model'} has none that loads here. "
                    "Pass one, or give rows of token ids."
                )
            # Long documents are cut into windows by the measures, so the tokenizer's own warning says nothing.
            rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        else:
            rows = [list(map(int, row)) for row in texts]
        size = getattr(self.config, "vocab_size", None)
        ids = [end for row in rows if row for end in (min(row), max(row))]
        if size is not None and ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"`{argument}` must give token ids from 0 to {size - 1} for {self.name or 'the model'}, got {wrong}. "
                "Is this its tokenizer?"
            )
        return rows


def evaluated(
    model: Any,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> EvaluatedModel:
    """
    A model to measure, from the object or from a folder or Hub id.

    Args:
        model: A model, an [`EvaluatedModel`], or the folder or Hub id of one; never code from there, only registered
            classes.
        tokenizer (*optional*): A tokenizer, or the folder or Hub id of one; that of `model` if not given.
        device (*optional*): Where to put a model that is loaded here; an object stays where it is.
        dtype (*optional*): In which precision to load it; that of its weights if not given.
        revision (*optional*): Commit, tag or branch on the Hub.

    Raises:
        ValueError: if nothing can be loaded from there, or the weights do not fit it.
    """
    if isinstance(model, EvaluatedModel):
        return model
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        loaded = _load(name, device, dtype, revision)
        return EvaluatedModel(loaded, _tokenizer(tokenizer if tokenizer is not None else name, revision), name, name)
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    if tokenizer is None and os.path.isdir(name):
        tokenizer = name
    if hasattr(model, "eval"):
        model.eval()
    return EvaluatedModel(model, _tokenizer(tokenizer, None), name)


def _load(name: str, device: Any, dtype: Any, revision: str | None) -> Any:
    model = load_model(name, argument="model", revision=revision, allow_unexpected=True, dtype=dtype or "auto")
    model.generation_config = plain_generation(
        getattr(model, "generation_config", None)
    )  # measures say how to generate
    return (model.to(device) if device is not None else model).eval()


def _tokenizer(source: Any, revision: str | None) -> Any:
    """A tokenizer from where it is said to be; `None` where there is none."""
    if source is None or not isinstance(source, str | os.PathLike):
        return source
    try:
        return load_tokenizer(source, argument="tokenizer", revision=revision)
    except ValueError:
        return None
