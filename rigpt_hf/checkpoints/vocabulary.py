"""Whether the tokens of two models mean the same, from configurations and tokenizers; no weights are read."""

import json
import logging
from typing import Any

from .opened import Stored


logger = logging.getLogger(__name__)

# The part of all ids that may mean other tokens where models are compared by their tokens.
MAY_DIFFER = 0.01


def common_tokens(a: Stored, b: Stored) -> int:
    """
    How many tokens two models have in common: all of the smaller vocabulary. What the larger has more is padding.

    Raises:
        ValueError: if a tokenizer of theirs gives tokens beyond, so that it is not.
    """
    sizes = [stored.config.vocab_size for stored in (a, b)]
    size = min(sizes)
    for stored in (a, b) if sizes[0] != sizes[1] else ():
        try:
            largest = max(stored.tokenizer().get_vocab().values(), default=0)
        except ValueError:
            continue
        if largest >= size:
            raise ValueError(
                f"`a` and `b` must have one vocabulary, but for padding, got {sizes[0]} tokens in {a.name!r} and "
                f"{sizes[1]} in {b.name!r}, and {largest} by the tokenizer of {stored.name!r}. Compare a model with "
                "what was made from it."
            )
    return size


def check_same_vocabulary(a: Stored, b: Stored) -> None:
    """
    Raise a `ValueError` if the tokens of two models mean different things: vocabularies of two sizes, but for padding,
    or, where both have a tokenizer, one token with two ids, or other merges. That one has none that loads is said, and
    no error.
    """
    common_tokens(a, b)
    try:
        first, second = a.tokenizer(), b.tokenizer()
    except ValueError:
        logger.warning(
            f"Whether the tokens of {a.name!r} and {b.name!r} mean the same was not checked: not both have a "
            "tokenizer that loads here."
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
            f"{places[0]} in {a.name!r}, {places[1]} in {b.name!r}. {advice}"
        )
    if merges_of(first) != merges_of(second):
        raise ValueError(
            f"`a` and `b` must have one tokenizer, got two that merge characters differently, in {a.name!r} and "
            f"{b.name!r}. {advice}"
        )


def shared_tokens(a: Stored, b: Stored) -> list[str]:
    """
    In words, how far the vocabularies of two models differ, where they are one but for a few tokens, or one extends
    the other.

    Raises:
        ValueError: if more ids mean two tokens, so that nothing about the two can be compared by tokens.
    """
    try:
        check_same_vocabulary(a, b)
    except ValueError as error:
        tables = [{index: token for token, index in stored.tokenizer().get_vocab().items()} for stored in (a, b)]
        both = tables[0].keys() & tables[1].keys()
        renamed = sum(tables[0][index] != tables[1][index] for index in both)
        if renamed > MAY_DIFFER * len(both) or (not renamed and len(tables[0]) == len(tables[1])):
            raise error
        return [f"Of the {len(both):,} ids that both models have, {renamed} mean another token; others are left out."]
    return []


def merges_of(tokenizer: Any) -> Any:
    """The merges of a byte-pair tokenizer; `None` for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")
