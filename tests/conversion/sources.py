"""Tiny stock models for conversion tests: every option on and off, all weights, gains and biases random."""

from collections.abc import Callable, Collection
from functools import cache

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


def gpt2_config(**options) -> GPT2Config:
    """3 layers of 24 dimensions, 4 heads, no dropout."""
    defaults = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**(defaults | dropout | TOKENS | options))


def _llama_options(**options) -> dict:
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return defaults | TOKENS | options


def llama_config(**options) -> LlamaConfig:
    return LlamaConfig(**_llama_options(**options))


def mistral_config(**options) -> MistralConfig:
    return MistralConfig(**_llama_options(**({"sliding_window": None} | options)))


def qwen2_config(**options) -> Qwen2Config:
    return Qwen2Config(**_llama_options(**options))


def _rope(rope_type: str, **options) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **options}}


# id of the test: class, configuration
SOURCES: dict[str, tuple[type[PreTrainedModel], Callable[[], object]]] = {
    "gpt2": (GPT2LMHeadModel, gpt2_config),
    "gpt2-untied": (GPT2LMHeadModel, lambda: gpt2_config(tie_word_embeddings=False)),
    "gpt2-gelu": (GPT2LMHeadModel, lambda: gpt2_config(activation_function="gelu")),
    "gpt2-gelu-tanh": (GPT2LMHeadModel, lambda: gpt2_config(activation_function="gelu_pytorch_tanh")),
    "gpt2-relu": (GPT2LMHeadModel, lambda: gpt2_config(activation_function="relu")),
    "gpt2-unscaled": (GPT2LMHeadModel, lambda: gpt2_config(scale_attn_weights=False)),
    "gpt2-layer-scaled": (GPT2LMHeadModel, lambda: gpt2_config(scale_attn_by_inverse_layer_idx=True)),
    "gpt2-unscaled-layer-scaled": (
        GPT2LMHeadModel,
        lambda: gpt2_config(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    ),
    "gpt2-upcast": (GPT2LMHeadModel, lambda: gpt2_config(reorder_and_upcast_attn=True)),
    "gpt2-inner": (GPT2LMHeadModel, lambda: gpt2_config(n_inner=50, layer_norm_epsilon=1e-3)),
    "llama": (LlamaForCausalLM, llama_config),
    "llama-tied": (LlamaForCausalLM, lambda: llama_config(tie_word_embeddings=True)),
    "llama-biases": (LlamaForCausalLM, lambda: llama_config(attention_bias=True, mlp_bias=True)),
    "llama-tied-biases": (
        LlamaForCausalLM,
        lambda: llama_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama-head-dim": (LlamaForCausalLM, lambda: llama_config(head_dim=10, rms_norm_eps=1e-3)),
    "llama-multi-head": (LlamaForCausalLM, lambda: llama_config(num_key_value_heads=4)),
    "llama-multi-query": (LlamaForCausalLM, lambda: llama_config(num_key_value_heads=1)),
    "llama-gelu": (LlamaForCausalLM, lambda: llama_config(hidden_act="gelu")),
    "llama-rope-linear": (LlamaForCausalLM, lambda: llama_config(**_rope("linear", factor=4.0))),
    "llama-rope-dynamic": (LlamaForCausalLM, lambda: llama_config(**_rope("dynamic", factor=4.0))),
    "llama-rope-yarn": (LlamaForCausalLM, lambda: llama_config(**_rope("yarn", factor=4.0))),
    "llama-rope-llama3": (
        LlamaForCausalLM,
        lambda: llama_config(
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
    ),
    "mistral": (MistralForCausalLM, mistral_config),
    "mistral-wide-window": (MistralForCausalLM, lambda: mistral_config(sliding_window=64)),
    "qwen2": (Qwen2ForCausalLM, qwen2_config),
    "qwen2-tied": (Qwen2ForCausalLM, lambda: qwen2_config(tie_word_embeddings=True)),
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
