"""Tokenizers in GGUF files: llama.cpp cuts texts into the same tokens, or the tokenizer is refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from rigpt_hf.conversion import certify, convert_checkpoint, convert_model
from rigpt_hf.conversion.gguf import export_gguf
from rigpt_hf.conversion.gguf_file import write_gguf
from rigpt_hf.conversion.gguf_tokenizer import LLAMA3, QWEN2, SPLITS

from ..models import randomise_
from ..processes import ROOT
from .llama_cpp import LlamaCpp, opened
from .sources import stock_model
from .test_gguf import plan_of


TRICKY = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶‍🌫️ (multiple emojis) ✅ 🦙🦙 "
    "3 33 333 3333 33333 3.3 3..3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо "
    "на Български ```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL   "
)
PLAIN = "The frame of the stream turns, and nothing else does: 1024 tokens, 16 heads."
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
KINDS = {
    "gpt-2": (BYTES, False),
    "smollm": (DIGITS, False),
    "llama-bpe": (split(LLAMA3), True),
    "smaug-bpe": (split(LLAMA3), False),
    "qwen2": (split(QWEN2), False),
}


def special(tokenizer: Tokenizer, begins: bool) -> PreTrainedTokenizerFast:
    """With tokens of its own, of which one may stand before every text."""
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    if begins:
        first = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", first)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


@cache
def byte_level(kind: str, begins: bool = False) -> PreTrainedTokenizerFast:
    """Merges that were learned from the README behind GPT-2's split, behind another one."""
    before, ignores = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores))
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTES, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(), *[TRICKY] * 5], trainer)
    tokenizer.pre_tokenizer = before
    return special(tokenizer, begins)


def sentencepiece(*, learned: bool = False, **options: Any) -> Any:
    """Llama's kind: characters that merge by the score of the result, and bytes for all others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, limit_alphabet=80, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: index for index, name in enumerate(names)}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    if not learned:
        merges = generate_merges(vocab, {piece: -float(index) for index, piece in enumerate(pieces)})
    made = LlamaTokenizer(vocab=vocab, merges=[tuple(merge) for merge in merges], **options)
    made.chat_template = TEMPLATE
    return made


def model_for(tokenizer: Any) -> Any:
    """A Llama with three rows more than there are tokens."""
    model = stock_model("llama-tied", torch.float32)
    config = type(model.config)(**(model.config.to_dict() | {"vocab_size": len(tokenizer) + 3}))
    torch.manual_seed(0)
    return randomise_(type(model)(config), 0, 0.5).eval()


def file_of(tokenizer: Any, folder: Path) -> Path:
    write_gguf(plan_of(model_for(tokenizer)), folder / "it.gguf", "float32", tokenizer, "it")
    return folder / "it.gguf"


def same_tokens(other: LlamaCpp, tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 10
    return other.tokenize(text) == ids


@pytest.mark.parametrize("begins", [False, True], ids=["bare", "begins"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_the_same_tokens(kind, begins, tmp_path):
    tokenizer = byte_level(kind, begins)
    assert tokenizer.backend_tokenizer.model.ignore_merges == KINDS[kind][1]
    with opened(file_of(tokenizer, tmp_path)) as other:
        for text in (TRICKY, PLAIN, (ROOT / "README.md").read_text()[:3000]):
            assert same_tokens(other, tokenizer, text), kind
        assert other.text(tokenizer(PLAIN)["input_ids"][begins:]) == PLAIN
        whole = "<|begin|>A <think> word<|end|>."
        assert other.tokenize(whole, special=True) == tokenizer(whole)["input_ids"]
        assert other.ends(tokenizer.eos_token_id) and not other.ends(tokenizer.bos_token_id)
        assert other.chat_template == TEMPLATE and other.vocab_size == len(tokenizer) + 3


def test_every_split_is_tried_and_every_other_gives_other_tokens(tmp_path, monkeypatch):
    assert set(KINDS) == set(SPLITS.values())
    others = {"gpt-2": "smollm", "smollm": "gpt-2", "llama-bpe": "qwen2", "smaug-bpe": "gpt-2", "qwen2": "llama-bpe"}
    for kind, wrong in others.items():
        key = next(key for key, word in SPLITS.items() if word == kind)
        with monkeypatch.context() as patch:
            patch.setitem(SPLITS, key, wrong)
            with opened(file_of(byte_level(kind), tmp_path)) as other:
                assert not same_tokens(other, byte_level(kind), TRICKY), (kind, wrong)


@pytest.mark.parametrize(
    "options", [{}, {"legacy": True}, {"add_prefix_space": False}], ids=["first", "always", "never"]
)
def test_characters_merge_by_score(options, tmp_path, caplog):
    tokenizer = sentencepiece(**options)
    with opened(file_of(tokenizer, tmp_path)) as other:
        for text in (TRICKY.strip(), PLAIN, (ROOT / "README.md").read_text()[:3000]):
            assert same_tokens(other, tokenizer, text)
        assert other.tokenize("A<s>B", special=True) == tokenizer("A<s>B")["input_ids"] or not options
        assert other.chat_template == TEMPLATE
    assert ("in front of what follows a special token" in caplog.text) == (not options)


def test_the_normalizer_of_older_files_is_the_same(tmp_path):
    """As Llama's `tokenizer.json` has it: spaces are replaced before, and nothing is split."""
    tokenizer = sentencepiece(legacy=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = None
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    older = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert older(PLAIN)["input_ids"] == tokenizer(PLAIN)["input_ids"]
    with opened(file_of(older, tmp_path)) as other:
        assert same_tokens(other, older, TRICKY.strip()) and same_tokens(other, older, PLAIN)


def test_other_tokenizers_are_refused_by_name(tmp_path):
    def bpe(before=BYTES, *, normalizer=None, after=None, **options):
        tokenizer = Tokenizer.from_str(byte_level("gpt-2").backend_tokenizer.to_str())
        state = json.loads(tokenizer.to_str())
        state["model"] |= options
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.pre_tokenizer, tokenizer.normalizer = before, normalizer or tokenizer.normalizer
        tokenizer.post_processor = after or tokenizer.post_processor
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")

    twice = processors.TemplateProcessing("<|begin|> <|begin|> $A", special_tokens=[("<|begin|>", 700)])
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)])))
    for tokenizer, said in (
        (unigram, "its algorithm is Unigram, and no BPE"),
        (bpe(dropout=0.1), "it has `dropout`"),
        (bpe(end_of_word_suffix="</w>"), "it has `end_of_word_suffix`"),
        (bpe(normalizer=normalizers.Lowercase()), "it changes texts by Lowercase first"),
        (bpe(pre_tokenizers.Whitespace()), "texts are split by Whitespace"),
        (bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), "texts are split by ByteLevel {"),
        (bpe(split(r"\w+")), r"texts are split by Split \\w\+, ByteLevel False, which has no name there"),
        (bpe(ignore_merges=True), "split by ByteLevel True without merges, which"),
        (bpe(after=twice), "it adds other special tokens to a text than its first and its last"),
        (sentencepiece(learned=True), "is merged from some of its parts and not from others|have different ranks"),
    ):
        with pytest.raises(ValueError, match=f"^`source` must have a tokenizer that llama.cpp has too: .*({said})"):
            file_of(tokenizer, tmp_path)


def test_what_llama_cpp_does_in_another_way_is_said(tmp_path, caplog):
    tokenizer = byte_level("qwen2").backend_tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    with opened(file_of(fast, tmp_path)) as other:
        assert same_tokens(other, fast, TRICKY)
    assert "composes letters with their accents first (NFC)" in caplog.text and "`<mask>`" in caplog.text


def test_a_server_answers_over_http(tmp_path):
    """llama.cpp's server, as the wheel has it, chats by the template in the file, as Transformers does."""
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer = byte_level("llama-bpe", False)
    model = convert_model(model_for(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out", progress=False)
    asked = [{"role": "user", "content": PLAIN}]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(tmp_path / "out" / "out-F32.gguf"), 64, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    body = json.dumps({"messages": asked, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 3})
    request = Request(f"{server.listening_address}/v1/chat/completions", body.encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request, timeout=60) as answer:
        (said,) = json.load(answer)["choices"]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        wanted = model(ids).logits[0, -1].double().log_softmax(-1).topk(3)
    (token,) = said["logprobs"]["content"]
    assert [one["id"] for one in token["top_logprobs"]] == wanted.indices.tolist()
    for one, value in zip(token["top_logprobs"], wanted.values.tolist(), strict=True):
        assert one["logprob"] == pytest.approx(value, abs=1e-4)


def test_a_folder_becomes_a_file_that_speaks(tmp_path):
    """From the folder of a RiGPT with its tokenizer to the text that llama.cpp generates."""
    tokenizer = byte_level("llama-bpe", True)
    model = convert_model(model_for(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "out", progress=False)
    ids = tokenizer(PLAIN, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    with opened(tmp_path / "out" / "out-F32.gguf") as other:
        assert other.tokenize(PLAIN, special=True) == ids[0].tolist()
        made = other.generate(ids[0].tolist(), 8)
        assert made == wanted and len(set(made)) > 1
        assert other.text(made) == tokenizer.decode(made, skip_special_tokens=True)
    # And back again, by what Transformers reads.
    convert_checkpoint(tmp_path / "out", tmp_path / "back", gguf_file="out-F32.gguf", progress=False)
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(PLAIN)["input_ids"] == ids[0].tolist() and back.chat_template == TEMPLATE
    certify(model, AutoModelForCausalLM.from_pretrained(tmp_path / "back"), ids).check()
    # The file itself is a source, too.
    convert_checkpoint(tmp_path / "out" / "out-F32.gguf", tmp_path / "again", progress=False)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(PLAIN)["input_ids"] == ids[0].tolist()
