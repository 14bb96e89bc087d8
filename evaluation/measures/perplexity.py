"""
Perplexity per token, per word and per byte, with everything that published numbers differ by said.

29.41, 29.94, 37.50 and 37.37 have all been published as GPT-2's perplexity on WikiText: they differ in whether
markers of the tokenised text are undone, in what is counted (tokens of the model or words of the text), in the length
and overlap of windows, and in whether the first token has anything before it. So all of that is an argument here, and
part of the result. Losses are in nats, `bits_per_byte` in bits; GPT-2's protocol is that of Radford et al. 2019,
section 3.1.
"""

import math
import re
from dataclasses import replace
from itertools import chain
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from ..likelihood import Progress, Side, exponential, no_progress, rolling_windows, score
from ..measure import Inputs, Measure, Quantity, rows_of_task
from ..models import EvaluatedModel, Texts, evaluated


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
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """
    The perplexity of a model on texts.

    Args:
        model, tokenizer: As for [`evaluated`].
        texts (`list[str]` or `list[list[int]]`): Documents, or rows of token ids.
        context (`int`, *optional*): Tokens that the model reads at once; all it takes, at most 1,024, if not given.
        stride (`int`, *optional*): How far windows lie apart; `context` if not given. See [`rolling_windows`].
        bos (`bool`, defaults to `False`): Whether each text starts with the tokenizer's beginning-of-sequence token,
            so that its first token is asked for too; without, that token is not scored.
        detokenizer (`"none"` or `"wikitext"`): What is undone before the model reads.
        separator (`str`, *optional*): Joins all texts into one; each is scored on its own if not given.
        batch_size, padding_side, progress: As for [`score`].

    Returns:
        `dict`: `loss` (nats per token), `perplexity` (its exponential), `tokens` (that were scored). For texts also
        `word_perplexity` and `byte_perplexity`, the exponentials of all nats over the number of words and of UTF-8
        bytes of the texts *as given*, before the detokenizer, which is what makes models with different tokenizers
        comparable (the bytes of a first token that is not scored do not count, its word does); `bits_per_byte`,
        `words`, `bytes`. `samples`: nats, tokens and bytes of each text (of each window where texts are joined), which
        paired tests need. `protocol`: all arguments that the number depends on.

    Raises:
        ValueError: if an argument is impossible, or nothing is left to score.
    """
    measured = evaluated(model, tokenizer)
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
        rows = [[measured.beginning(), *row] for row in rows]
    elif bytes_ is not None:
        # Bytes that are not asked for must not be counted, or long tokens would make a model look good.
        firsts = [first_bytes(measured, row, text) for row, text in zip(rows, given, strict=True)]
        bytes_ = [max(size - first, 0) for size, first in zip(bytes_, firsts, strict=True)]
    windows = [list(rolling_windows(row, context, stride)) for row in rows]
    scores = score(
        measured, chain.from_iterable(windows), batch_size=batch_size, padding_side=padding_side, progress=progress
    )
    sums = [[float(next(scores).losses.sum()) for _ in parts] for parts in windows]
    counts = [[len(window.targets) for window in parts] for parts in windows]
    joined = len(rows) == 1
    samples: dict[str, Any] = {
        "nats": sums[0] if joined else [sum(parts) for parts in sums],
        "tokens": counts[0] if joined else [sum(parts) for parts in counts],
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


def first_bytes(measured: EvaluatedModel, row: list[int], text: str) -> int:
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


def needs(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
    """Texts begin with the token for that, if there is one, so that every token of their own counts."""
    inputs = rows_of_task(model, texts, task)
    if texts.are_tokens:
        return inputs
    return replace(inputs, arguments={"bos": model.first_token is not None} | inputs.arguments)


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """Perplexity, and what it is tested by: bits per byte, or the loss where examples have no number of bytes."""
    samples = result["samples"]
    nats, tokens = samples["nats"], samples["tokens"]
    listed = [Quantity("perplexity", "per token", result["perplexity"], "less", nats, tokens, is_exponential=True)]
    if "bytes" in samples:
        bits = [amount / math.log(2) for amount in nats]
        listed.append(Quantity("bits per byte", "bits", result["bits_per_byte"], "less", bits, samples["bytes"]))
    else:
        # Token ids, or texts joined to one, whose windows have a number of tokens but not of bytes.
        listed.append(Quantity("loss", "nats per token", result["loss"], "less", nats, tokens))
        if "bits_per_byte" in result:
            listed.append(Quantity("bits per byte", "bits", result["bits_per_byte"]))
    if "word_perplexity" in result:
        listed.append(Quantity("word perplexity", "per word", result["word_perplexity"]))
    return listed


MEASURE = Measure(
    "perplexity",
    "How well does the model predict the text? Less is better.",
    perplexity,
    quantities,
    needs=needs,
    card_words="perplexity",
    hub_types={
        "perplexity": "perplexity",
        "word perplexity": "word_perplexity",
        "bits per byte": "bits_per_byte",
        "loss": "loss",
    },
)
