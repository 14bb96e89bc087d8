"""
Perplexity per token, per word and per byte, with everything that published numbers differ by said.

29.41, 29.94, 37.50 and 37.37 have all been published as GPT-2's perplexity on WikiText: they differ in whether
markers of the tokenised text are undone, in what is counted (tokens of the model or words of the text), in the length
and overlap of windows, and in whether the first token has anything before it. So all of that is an argument here, and
part of the result.
"""

import math
import re
from itertools import chain
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from .likelihood import Side, Tick, no_tick, rolling_windows, score
from .subjects import Subject, Texts, subject


# WikiText as published has spaces around punctuation and marks inside numbers and words; in this order, they go.
WIKITEXT = (
    (r" @(\D)@ ", r"\1"),
    (r" ([:;!?.,])(?= )", r"\1"),
    (r" ([:;!?.,])$", r"\1"),
    (r"\( (.*?) \)", r"(\1)"),
    (r"\[ (.*?) \]", r"[\1]"),
    (r"\{ (.*?) \}", r"{\1}"),
    (r"\" (.*?) \"", r'"\1"'),
    (r" '(s|t|re|ve|m|ll|d)\b", r"'\1"),
    (r"= = = = (.*?) = = = =", r"==== \1 ===="),
    (r"= = = (.*?) = = =", r"=== \1 ==="),
    (r"= = (.*?) = =", r"== \1 =="),
    (r" N ", " 1 "),
)
# How tokens of single bytes are called, where all are written as characters that can be seen, and where some are.
BYTES, BYTE = frozenset(ByteLevel.alphabet()), re.compile(r"<0x[0-9A-F]{2}>")
DETOKENIZERS = {"none": (), "wikitext": WIKITEXT}


def detokenize(text: str, kind: str) -> str:
    """
    A text as people write it, from one as a corpus was tokenised.

    Raises:
        ValueError: if `kind` is unknown.
    """
    if kind not in DETOKENIZERS:
        raise ValueError(f"`detokenizer` must be one of {', '.join(DETOKENIZERS)}, got {kind!r}.")
    for pattern, replacement in DETOKENIZERS[kind]:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def perplexity(
    model: Any,
    texts: Texts,
    tokenizer: Any = None,
    *,
    context: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    detokenizer: str = "none",
    separator: str | None = None,
    batch_size: int = 8,
    padding_side: Side = "right",
    tick: Tick = no_tick,
) -> dict[str, Any]:
    """
    The perplexity of a model on texts.

    Args:
        model, tokenizer: As for [`subject`].
        texts (`list[str]` or `list[list[int]]`): Documents, or rows of token ids.
        context (`int`, *optional*): Tokens that the model reads at once; all it takes, at most 1,024, if not given.
        stride (`int`, *optional*): How far windows lie apart; `context` if not given. See [`rolling_windows`].
        bos (`bool`, defaults to `False`): Whether each text starts with the tokenizer's beginning-of-sequence token,
            so that its first token is asked for too; without, that token is not scored.
        detokenizer (`"none"` or `"wikitext"`): What is undone before the model reads.
        separator (`str`, *optional*): Joins all texts into one; each is scored on its own if not given.
        batch_size, padding_side, tick: As for [`score`].

    Returns:
        `dict`: `loss` (nats per token), `perplexity` (its exponential), `tokens` (that were scored). For texts also
        `word_perplexity` and `byte_perplexity`, the exponentials of all nats over the number of words and of UTF-8
        bytes of the texts *as given*, before the detokenizer, which is what makes models with different tokenizers
        comparable (the bytes of a first token that is not scored do not count, its word does); `bits_per_byte`,
        `words`, `bytes`. `samples`: nats, tokens and bytes of each text (of each window
        where texts are joined), which paired tests need. `protocol`: all arguments that the number depends on.

    Raises:
        ValueError: if an argument is impossible, or nothing is left to score.
    """
    measured = subject(model, tokenizer)
    context = measured.context(context)
    as_text = not isinstance(texts, str) and len(texts) > 0 and isinstance(texts[0], str)
    if not as_text and (detokenizer != "none" or separator is not None):
        raise ValueError("`detokenizer` and `separator` are for texts, got rows of token ids. Leave them out.")
    words = bytes_ = None
    given = plain(texts, detokenizer)
    if as_text:
        words, bytes_ = [len(text.split()) for text in texts], [len(text.encode()) for text in texts]  # type: ignore[union-attr]
        if separator is not None:
            joints = len(separator.encode()) * (len(given) - 1)
            words, bytes_, given = [sum(words)], [sum(bytes_) + joints], [separator.join(given)]
    rows = measured.encode(given)
    if bos:
        rows = [[beginning(measured), *row] for row in rows]
    elif bytes_ is not None:
        # What is not asked for must not be counted, or long tokens would make a model look good.
        firsts = [first_bytes(measured, row, text) for row, text in zip(rows, given, strict=True)]
        bytes_ = [max(size - first, 0) for size, first in zip(bytes_, firsts, strict=True)]
    windows = [list(rolling_windows(row, context, stride)) for row in rows]
    scores = score(measured, chain.from_iterable(windows), batch_size=batch_size, padding_side=padding_side, tick=tick)
    sums = [[float(next(scores).losses.sum()) for _ in each] for each in windows]
    counts = [[len(window.targets) for window in each] for each in windows]
    joined = len(rows) == 1
    samples: dict[str, Any] = {
        "nats": sums[0] if joined else [sum(each) for each in sums],
        "tokens": counts[0] if joined else [sum(each) for each in counts],
    }
    if bytes_ is not None and not joined:
        samples["bytes"] = bytes_
    total, tokens = math.fsum(samples["nats"]), sum(samples["tokens"])
    if tokens == 0:
        raise ValueError(
            f"`predictions` must give at least two tokens, got {sum(map(len, rows))} in {len(rows)} texts. Give "
            "longer texts, or `bos=True`."
        )
    result: dict[str, Any] = {"loss": total / tokens, "perplexity": exponential(total / tokens), "tokens": tokens}
    if words is not None and bytes_ is not None:
        result |= {"words": sum(words), "bytes": sum(bytes_)}
        if result["words"]:
            result["word_perplexity"] = exponential(total / result["words"])
        result["byte_perplexity"] = exponential(total / result["bytes"])
        result["bits_per_byte"] = total / result["bytes"] / math.log(2)
    result["samples"] = samples
    result["protocol"] = {
        "context": context,
        "stride": context if stride is None else stride,
        "bos": bos,
        "detokenizer": detokenizer,
        "separator": separator,
        "texts": len(texts),
    }
    return result


def plain(texts: Texts, detokenizer: str) -> Any:
    """Texts as the model reads them; rows of token ids as they are."""
    if isinstance(texts, str) or len(texts) == 0 or not isinstance(texts[0], str):
        return texts
    return [detokenize(text, detokenizer) for text in texts]  # type: ignore[arg-type]


def first_bytes(measured: Subject, row: list[int], text: str) -> int:
    """UTF-8 bytes of a text that its first token stands for."""
    if not row:
        return 0
    piece = measured.tokenizer.decode(row[:1])
    # A space that the tokenizer put there is not of the text.
    added = piece.startswith(" ") and not text.startswith(" ")
    if "\ufffd" in piece:
        # Part of a character, which decodes to a mark of three bytes; the token's own name says how many it has.
        token = measured.tokenizer.convert_ids_to_tokens(row[0])
        if BYTE.fullmatch(token):
            return 1
        if set(token) <= BYTES:
            return len(token) - added
    return len(piece.encode()) - added


def exponential(value: float) -> float:
    """`exp`, infinite where it is too large for a number."""
    return math.inf if value >= 700 else math.exp(value)


def beginning(measured: Subject) -> int:
    """
    The id of the token that texts begin with; GPT-2's end-of-text serves as that too.

    Raises:
        ValueError: if neither the tokenizer nor the configuration knows one that the model has a row for.
    """
    for source in (measured.tokenizer, getattr(measured.model, "config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            size = getattr(getattr(measured.model, "config", None), "vocab_size", None)
            if isinstance(value, int) and (size is None or 0 <= value < size):
                return value
    raise ValueError("`bos` needs a token that texts begin with, and the tokenizer has none. Leave it out.")
