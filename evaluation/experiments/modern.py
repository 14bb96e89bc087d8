"""
A modern GPT with a preferred basis, the baseline that one would pick without a thought for symmetry.

Put together from public descriptions of fast small recipes (nanochat, modded-nanogpt): RMSNorm without gain, rotary
positions, normalised queries and keys, relu² neurons, an untied head, per-layer scalars, the previous token mixed in,
value embeddings, soft-capped logits; Muon for matrices and Adam, coordinate by coordinate, for everything else. The
network is RiGPT's, with what those recipes have besides or instead: gates that read the first coordinates of the
stream, and output maps that start at zero. It is there to be trained and measured, and keeps no cache.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, RiGPTModel
from rigpt_hf.decoder_rigpt import RiGPTDecoderLayer
from rigpt_hf.training.kinds import KINDS, Kind


# Coordinates of the stream that gates read.
GATE_COORDINATES = 24
# Standard deviations of the table of tokens and of the head.
EMBEDDING_STD, HEAD_STD = 1.0, 0.001
# Soft bound of the logits.
LOGIT_CAP = 15.0


class ModernGPTConfig(RiGPTConfig):
    """A [`RiGPTConfig`] of another model, with the options that such recipes share."""

    model_type = "modern-gpt"

    def __init__(self, **options: Any):
        recipe = {
            "hidden_act": "relu2",
            "qk_norm": True,
            "embedding_norm": True,
            "value_embedding_period": 2,
            "tie_word_embeddings": False,
            "use_cache": False,
        }
        super().__init__(**(recipe | options))


class CoordinateGate(nn.Linear):
    """A linear map of the first coordinates: which ones those are is a choice of basis."""

    starts_at_zero = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states[..., : self.in_features])


class CappedHead(nn.Linear):
    """Logits `c tanh(z / c)`, which never leave `(-c, c)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return LOGIT_CAP * torch.tanh(super().forward(hidden_states) / LOGIT_CAP)


class PreviousToken(nn.Module):
    """`x[t] + c sigmoid(w·x[t]) x[t-1]`; `w` reads the first coordinates, `c` is at first 0."""

    def __init__(self, config: ModernGPTConfig):
        super().__init__()
        self.gate = CoordinateGate(min(GATE_COORDINATES, config.hidden_size), 1, bias=False)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        """`hidden_states` `[B, S, d]`, `position_ids` `[B or 1, S]`: 0 where a text begins."""
        previous = nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        previous = previous.masked_fill((position_ids == 0).expand(len(hidden_states), -1)[..., None], 0.0)
        return hidden_states + self.weight * torch.sigmoid(self.gate(hidden_states)) * previous


class ModernGPTDecoderLayer(RiGPTDecoderLayer):
    """The first mixes in the previous token; the others read the stream's beginning again: `x <- a x + b x0`."""

    def __init__(self, config: ModernGPTConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        first = layer_idx == 0
        self.previous_token = PreviousToken(config) if first else None
        self.residual_weight = None if first else nn.Parameter(torch.ones(1))
        self.embedding_weight = None if first else nn.Parameter(torch.zeros(1))

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *, position_ids: torch.LongTensor, beginning: list[torch.Tensor], **kwargs
    ) -> torch.Tensor:
        """`beginning`: empty, and filled by the first layer for the others."""
        if self.previous_token is not None:
            hidden_states = self.previous_token(hidden_states, position_ids)
            beginning.append(hidden_states)
        else:
            hidden_states = self.residual_weight * hidden_states + self.embedding_weight * beginning[0]
        return super().forward(hidden_states, position_ids=position_ids, **kwargs)


class StartsAsRecipesDo:
    """Initial weights: large embeddings, a small head, maps that keep lengths, nothing written to the stream."""

    config: ModernGPTConfig
    # A layer that is computed again would not find the beginning.
    supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["ModernGPTDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        zero = getattr(module, "starts_at_zero", False) or getattr(module, "writes_to_residual", False)
        if zero or isinstance(module, PreviousToken):
            init.zeros_(module.weight)
        elif isinstance(module, ModernGPTDecoderLayer):
            if module.residual_weight is not None:
                init.ones_(module.residual_weight)
                init.zeros_(module.embedding_weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, nn.Linear):
            head = module.out_features == self.config.vocab_size
            init.normal_(module.weight, std=HEAD_STD if head else module.in_features**-0.5)
        else:
            super()._init_weights(module)  # type: ignore[misc]


class ModernGPTModel(StartsAsRecipesDo, RiGPTModel):
    """The network below the head."""

    config_class = ModernGPTConfig

    def __init__(self, config: ModernGPTConfig):
        super().__init__(config)
        read = min(GATE_COORDINATES, config.hidden_size)
        self.layers = nn.ModuleList(ModernGPTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        for layer in self.layers:
            if layer.self_attn.value_gate is not None:
                layer.self_attn.value_gate = CoordinateGate(read, config.num_key_value_heads, bias=False)
        self.post_init()

    def forward(self, *args, past_key_values=None, use_cache: bool | None = None, **kwargs):
        """
        As RiGPT's.

        Raises:
            ValueError: if there is to be a cache, in which the vector of the previous token has no place.
        """
        if past_key_values is not None or use_cache:
            raise ValueError(
                "`use_cache` must be False for the modern baseline, which keeps no previous token in a cache, got "
                f"use_cache={use_cache} and a {type(past_key_values).__name__}. Pass `use_cache=False`."
            )
        return super().forward(*args, use_cache=False, beginning=[], **kwargs)


class ModernGPTForCausalLM(StartsAsRecipesDo, RiGPTForCausalLM):
    """The baseline; trained with Muon."""

    config_class = ModernGPTConfig

    def __init__(self, config: ModernGPTConfig):
        super().__init__(config)
        self.model = ModernGPTModel(config)
        self.lm_head = CappedHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(ModernGPTConfig.model_type, ModernGPTConfig)
AutoModelForCausalLM.register(ModernGPTConfig, ModernGPTForCausalLM)
KINDS["modern-gpt"] = Kind(ModernGPTConfig, ModernGPTForCausalLM)
