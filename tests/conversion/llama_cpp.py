"""llama.cpp itself, out of the PyPI wheel `xllamacpp`, whose library exports `llama.h`: the part that tests need."""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch


class _ModelParams(ctypes.Structure):
    """As `llama_model_default_params` fills it: tests change nothing in it, and it may grow."""

    _fields_ = [("devices", ctypes.c_void_p), ("overrides", ctypes.c_void_p), ("rest", ctypes.c_byte * 496)]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, ctypes.c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext", "yarn_attn")),
        *((name, ctypes.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_byte * 384),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


F32, NO_FLASH = 0, 0
# What the library fills a context's parameters with, by which it is known that they lie where they are looked for.
DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "rope_scaling_type": -1, "yarn_ext": -1.0, "type_k": 1}
_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []


@_log
def _keep(level: int, text: bytes, _: object) -> None:
    if level >= 3:  # warnings and errors
        _said.append(text.decode(errors="replace"))


def _library() -> ctypes.CDLL:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp (`pip install xllamacpp`)")
    found = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert found is not None and found.origin is not None
    library = ctypes.CDLL(found.origin)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_log_set", None, [_log, pointer]),
        ("llama_model_default_params", _ModelParams, []),
        ("llama_context_default_params", _ContextParams, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _ModelParams]),
        ("llama_model_free", None, [pointer]),
        ("llama_init_from_model", pointer, [pointer, _ContextParams]),
        ("llama_free", None, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_vocab_is_eog", ctypes.c_bool, [pointer, number]),
        ("llama_vocab_bos", number, [pointer]),
        ("llama_batch_init", _Batch, [number, number, number]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
        ("llama_model_chat_template", ctypes.c_char_p, [pointer, ctypes.c_char_p]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
        ("llama_detokenize", number, [pointer, pointer, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_keep, None)
    library.llama_backend_init()
    defaults = library.llama_context_default_params()
    if any(getattr(defaults, name) != value for name, value in DEFAULTS.items()):
        pytest.skip("this release of xllamacpp has another `llama_context_params` than tests/conversion/llama_cpp.py")
    return library


class LlamaCpp:
    """A GGUF file as llama.cpp has it, with its cache in float32."""

    def __init__(self, library: ctypes.CDLL, model: int, context: int, batch: _Batch, length: int):
        self.library, self.model, self.context, self.batch, self.length = library, model, context, batch, length
        self.vocabulary = library.llama_model_get_vocab(model)
        self.vocab_size = library.llama_vocab_n_tokens(self.vocabulary)

    def logits(self, ids: torch.Tensor, kept: bool = False) -> torch.Tensor:
        """The logits `[seq, vocab]` of token ids `[seq]`; with `kept` they follow those of the last call."""
        if not kept:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
            self.seen = 0
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for place, token in enumerate(ids.tolist()):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, self.seen + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert self.library.llama_decode(self.context, batch) == 0, "".join(_said)
        self.seen += count
        rows = [self.library.llama_get_logits_ith(self.context, place) for place in range(count)]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows]))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special` those of special tokens in it, and of those that begin every text."""
        data, room = text.encode(), 4 * len(text.encode()) + 8
        ids = (ctypes.c_int32 * room)()
        return ids[: self.library.llama_tokenize(self.vocabulary, data, len(data), ids, room, special, special)]

    def text(self, ids: list[int]) -> str:
        """The text of token ids."""
        given, held = (ctypes.c_int32 * len(ids))(*ids), ctypes.create_string_buffer(64 * len(ids) + 8)
        count = self.library.llama_detokenize(self.vocabulary, given, len(ids), held, ctypes.sizeof(held), False, True)
        return held.raw[:count].decode(errors="replace")

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The most probable continuation, token by token through the cache."""
        made: list[int] = []
        row = self.logits(torch.tensor(ids))[-1]
        while len(made) < count:
            made.append(int(row.argmax()))
            row = self.logits(torch.tensor(made[-1:]), kept=True)[-1]
        return made

    @property
    def chat_template(self) -> str | None:
        """The template for chats in the file."""
        held = self.library.llama_model_chat_template(self.model, None)
        return None if held is None else held.decode()

    def ends(self, token: int) -> bool:
        """Whether a token ends what is generated."""
        return self.library.llama_vocab_is_eog(self.vocabulary, token)


@contextmanager
def opened(path: Path, length: int = 512) -> Iterator[LlamaCpp]:
    """llama.cpp with a GGUF file; skips where it is not installed, and fails where it does not take the file."""
    library = _library()
    _said.clear()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert model, "".join(_said)
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = F32
    params.flash_attn_type = NO_FLASH
    context = library.llama_init_from_model(model, params)
    assert context, "".join(_said)
    batch = library.llama_batch_init(length, 0, 1)
    try:
        yield LlamaCpp(library, model, context, batch, length)
    finally:
        library.llama_batch_free(batch)
        library.llama_free(context)
        library.llama_model_free(model)
