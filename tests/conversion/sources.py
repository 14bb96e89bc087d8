"""Tiny stock models for conversion tests: every option on and off, all weights, gains and biases random."""

from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import convert_model

from ..models import randomise_


VOCAB = 61
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def gpt2_config(**options) -> GPT2Config:
    """3 layers of 24 dimensions, 4 heads, no dropout."""
    defaults = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**(defaults | dropout | TOKENS | options))


def llama_config(**options) -> LlamaConfig:
    return LlamaConfig(**(SIZES | TOKENS | options))


def mistral_config(**options) -> MistralConfig:
    return MistralConfig(**(SIZES | TOKENS | {"sliding_window": None} | options))


def qwen2_config(**options) -> Qwen2Config:
    return Qwen2Config(**(SIZES | TOKENS | options))


def _rope(rope_type: str, **options) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **options}}


CLASSES = {
    "gpt2": (GPT2LMHeadModel, gpt2_config),
    "llama": (LlamaForCausalLM, llama_config),
    "mistral": (MistralForCausalLM, mistral_config),
    "qwen2": (Qwen2ForCausalLM, qwen2_config),
}
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# id of the test, which begins with the family: options of the configuration
OPTIONS: dict[str, dict] = {
    "gpt2": {},
    "gpt2-untied": {"tie_word_embeddings": False},
    "gpt2-gelu": {"activation_function": "gelu"},
    "gpt2-gelu-tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gpt2-relu": {"activation_function": "relu"},
    "gpt2-unscaled": {"scale_attn_weights": False},
    "gpt2-layer-scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2-unscaled-layer-scaled": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "gpt2-upcast": {"reorder_and_upcast_attn": True},
    "gpt2-inner": {"n_inner": 50, "layer_norm_epsilon": 1e-3},
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": BIASES,
    "llama-tied-biases": BIASES | {"tie_word_embeddings": True},
    "llama-head-dim": {"head_dim": 10, "rms_norm_eps": 1e-3},
    "llama-multi-head": {"num_key_value_heads": 4},
    "llama-multi-query": {"num_key_value_heads": 1},
    "llama-gelu": {"hidden_act": "gelu"},
    "llama-rope-linear": _rope("linear", factor=4.0),
    "llama-rope-dynamic": _rope("dynamic", factor=4.0),
    "llama-rope-yarn": _rope("yarn", factor=4.0),
    "llama-rope-llama3": _rope("llama3", factor=8.0, **LLAMA3),
    "mistral": {},
    "mistral-wide-window": {"sliding_window": 64},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
}
SOURCES: dict[str, tuple[type[PreTrainedModel], Callable[[], Any]]] = {
    name: (CLASSES[name.split("-")[0]][0], partial(CLASSES[name.split("-")[0]][1], **options))
    for name, options in OPTIONS.items()
}

# Every option of them once; the others where tests marked `full` run.
QUICK = (
    "gpt2",
    "gpt2-untied",
    "gpt2-relu",
    "gpt2-unscaled-layer-scaled",
    "gpt2-inner",
    "llama",
    "llama-tied-biases",
    "llama-head-dim",
    "llama-multi-query",
    "llama-rope-dynamic",
    "llama-rope-yarn",
    "mistral-wide-window",
    "qwen2-tied",
)


def over_sources(quick: Collection[str] = QUICK) -> pytest.MarkDecorator:
    """A test for each `name` of a source: those of `quick` always, all others where tests marked `full` run."""
    rest = [pytest.param(name, marks=pytest.mark.full) for name in SOURCES if name not in quick]
    return pytest.mark.parametrize("name", [*quick, *rest])


def stock_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> PreTrainedModel:
    """A randomised stock model in evaluation mode."""
    model_class, make_config = SOURCES[name]
    config = make_config()
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return randomise_(model_class(config).to(torch.float64), seed).to(dtype).eval()


@cache
def converted_pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, RiGPTForCausalLM]:
    """A stock model and what it becomes; made once, so neither may be changed."""
    source = stock_model(name, dtype)
    return source, convert_model(source)
