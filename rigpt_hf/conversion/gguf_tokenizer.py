"""
A tokenizer of Transformers, as llama.cpp writes it down.

llama.cpp has two algorithms that matter here. Its "gpt2" merges bytes by rank, after a split whose regular expression
a file names in one word. Its "llama" merges characters by the score of what they become.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.utils import logging

from ..checkpoints.source import shown
from ..checkpoints.weights import name_some


logger = logging.get_logger(__name__)

SPACE = "▁"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", rf"{_WORDS}\p{{N}}{_REST}"
Steps = tuple[tuple[Any, ...], ...]
# llama.cpp's word for what comes before merging, and whether a word that is a token is one at once.
SPLITS: dict[tuple[Steps, bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", LLAMA3), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", LLAMA3), ("ByteLevel", False)), False): "smaug-bpe",
    ((("Split", QWEN2), ("ByteLevel", False)), False): "qwen2",
}


def write_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    """
    Write tokens, merges, special tokens and the chat template.

    Args:
        writer (`GGUFWriter`): of the file.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): without one, a file says so.
        config: the stock configuration; rows of its tables without a token get a name that no text has.

    Raises:
        ValueError: if llama.cpp would cut texts into other tokens; the message says by what.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    model = state.get("model", {})
    if model.get("type") != "BPE":
        raise _refusal(f"its algorithm is {model.get('type', type(tokenizer).__name__)}, and no BPE")
    if odd := [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]:
        raise _refusal(f"it has {name_some(odd)}")
    if model.get("byte_fallback"):
        _write_characters(writer, state, config)
    else:
        _write_bytes(writer, state, config)
    _write_special(writer, tokenizer, state, config)


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"`source` must have a tokenizer that llama.cpp has too: {reason}. Take the files of the tokenizer out of a "
        "copy of the folder for a file without one, which takes ids of tokens."
    )


def _write_bytes(writer: Any, state: Mapping[str, Any], config: Any) -> None:
    """Merging of bytes, by rank."""
    normalizer = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    if normalizer not in ([], ["NFC"]):
        raise _refusal(f"it changes texts by {', '.join(normalizer)} first")
    if normalizer:
        logger.warning("The tokenizer composes letters with their accents first (NFC), and llama.cpp does not.")
    ignores = bool(state["model"].get("ignore_merges"))
    steps = tuple(_in_short(step) for step in _steps(state["pre_tokenizer"], "pretokenizers"))
    if (word := SPLITS.get((steps, ignores))) is None:
        said = ", ".join(" ".join(map(str, step)) for step in steps) or "nothing"
        raise _refusal(
            f"texts are split by {shown(said)}{' without merges' if ignores else ''}, which has no name there"
        )
    import gguf

    tokens, kinds = _tokens(state, config, gguf.TokenType)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(word)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in _merges(state)])


def _write_characters(writer: Any, state: Mapping[str, Any], config: Any) -> None:
    """Merging of characters by the score of the result, as SentencePiece does it; what is left is told as bytes."""
    normalizers = _steps(state["normalizer"], "normalizers")
    steps = [
        tuple(str(step.get(key)) for key in ("type", "prepend", "content") if key in step) for step in normalizers
    ]
    before = _steps(state["pre_tokenizer"], "pretokenizers")
    scheme = "never"
    if steps[:1] == [("Prepend", SPACE)]:
        scheme = "always"
        del steps[0]
    if before and before[0]["type"] == "Metaspace" and not before[0]["split"] and not steps:
        scheme = before.pop(0)["prepend_scheme"]
    elif steps == [("Replace", SPACE)]:
        steps = []
    if steps or before:
        said = [step["type"] for step in (*normalizers, *_steps(state["pre_tokenizer"], "pretokenizers"))]
        raise _refusal(f"it changes and splits texts by {', '.join(said)}, which is not SentencePiece's way")
    if scheme == "first":
        logger.warning("llama.cpp puts a space in front of what follows a special token, and this tokenizer does not.")
    import gguf

    tokens, kinds = _tokens(state, config, gguf.TokenType)
    ranks = _ranks(state, {token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.NORMAL})
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(scheme != "never")


def _ranks(state: Mapping[str, Any], tokens: set[str]) -> dict[str, int]:
    """
    The rank of each token, by which pairs are merged that become it.

    Raises:
        ValueError: if the order of merges says more than an order of tokens, as one that was learned does.
    """
    ranks: dict[str, int] = {}
    merges, last = {tuple(pair) for pair in _merges(state)}, ""
    for pair in _merges(state):
        if (token := "".join(pair)) != last and token in ranks:
            raise _refusal(f"merges into {shown(token)!r} have different ranks")
        ranks.setdefault(token, len(ranks))
        last = token
    for token in tokens:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if any(first in tokens and second in tokens and (first, second) not in merges for first, second in pairs):
            raise _refusal(f"{shown(token)!r} is merged from some of its parts and not from others")
    return ranks


def _steps(state: Mapping[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if state is None:
        return []
    return [dict(step) for step in (state[several] if state["type"] == "Sequence" else [state])]


def _in_short(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """A step of what comes before merging, by what matters of it; as it is where that is another than usual."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel", regex
        case {"type": "Digits", "individual_digits": individual}:
            return "Digits", individual
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return "Split", regex
    return step["type"], json.dumps(step, ensure_ascii=False)


def _merges(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in state["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _tokens(state: Mapping[str, Any], config: Any, kinds: Any) -> tuple[list[str], list[int]]:
    """Token and kind of every row of the tables."""
    by_id = {index: token for token, index in state["model"]["vocab"].items()}
    kind_of = dict.fromkeys(by_id, kinds.NORMAL)
    if state["model"].get("byte_fallback"):
        kind_of |= {state["model"]["vocab"][name]: kinds.BYTE for name in (f"<0x{byte:02X}>" for byte in range(256))}
        if (unknown := state["model"].get("unk_token")) is not None:
            kind_of[state["model"]["vocab"][unknown]] = kinds.UNKNOWN
    for added in state["added_tokens"]:
        by_id[added["id"]] = added["content"]
        if kind_of.get(added["id"]) != kinds.UNKNOWN:
            kind_of[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    if odd := [t["content"] for t in state["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]:
        logger.warning(f"The tokens {name_some(odd)} are found by llama.cpp whatever stands beside them, and keep it.")
    rows = range(config.vocab_size)
    return [by_id.get(row, f"[PAD{row}]") for row in rows], [kind_of.get(row, kinds.UNUSED) for row in rows]


def _write_special(writer: Any, tokenizer: Any, state: Mapping[str, Any], config: Any) -> None:
    """Special tokens by their ids, which of them are added to every text, and chat templates."""
    begins, ends = _id(tokenizer, config, "bos"), _id(tokenizer, config, "eos")
    for add, index in (
        (writer.add_bos_token_id, begins),
        (writer.add_eos_token_id, ends),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    bare = tokenizer("A word.", add_special_tokens=False)["input_ids"]
    whole = tokenizer("A word.")["input_ids"]
    ways = {
        (first, last): [*([begins] if first else []), *bare, *([ends] if last else [])]
        for first in (False, True)
        for last in (False, True)
    }
    if (way := next((way for way, ids in ways.items() if ids == whole), None)) is None:
        raise _refusal("it adds other special tokens to a text than its first and its last")
    writer.add_add_bos_token(way[0])
    writer.add_add_eos_token(way[1])
    if template := tokenizer.chat_template:
        several = isinstance(template, dict)
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()] if several else template
        )


def _id(tokenizer: Any, config: Any, name: str) -> int | None:
    """The id of a special token by the tokenizer, or else by the configuration, which may have several."""
    index = getattr(tokenizer, f"{name}_token_id")
    index = getattr(config, f"{name}_token_id", None) if index is None else index
    return (index[0] if index else None) if isinstance(index, list) else index
