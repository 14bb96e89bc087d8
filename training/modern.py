"""
What one would pick today without a thought for symmetry: a modern GPT with a preferred basis, as a baseline.

Put together from public descriptions of fast small recipes (nanochat, modded-nanogpt): RMSNorm without gain, rotary
positions, normalised queries and keys, relu² neurons, an untied head, per-layer scalars, value embeddings, soft-capped
logits; Muon for matrices and Adam, coordinate by coordinate, for everything else. The network is RiGPT's, with what
those recipes have instead: gates that read the first coordinates of the stream, and output maps that start at zero.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, RiGPTModel


# Coordinates of the stream that gates read.
GATE_COORDINATES = 24
# Standard deviations of the table of tokens and of the head.
EMBEDDING_STD, HEAD_STD = 1.0, 0.001


class ModernGPTConfig(RiGPTConfig):
    """A [`RiGPTConfig`] of another model, with the options that such recipes share."""

    model_type = "modern-gpt"

    def __init__(self, **options: Any):
        recipe = {
            "hidden_act": "relu2",
            "qk_norm": True,
            "embedding_norm": True,
            "previous_token_mixing": True,
            "residual_scalars": True,
            "value_embedding_period": 2,
            "final_logit_softcapping": 15.0,
            "tie_word_embeddings": False,
        }
        super().__init__(**(recipe | options))


class CoordinateGate(nn.Linear):
    """A linear map of the first coordinates: which ones those are is a choice of basis."""

    starts_at_zero = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states[..., : self.in_features])


class StartsAsRecipesDo:
    """Initial weights: large embeddings, a small head, maps that keep lengths, nothing written to the stream."""

    config: ModernGPTConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if getattr(module, "starts_at_zero", False) or getattr(module, "writes_to_residual", False):
            init.zeros_(module.weight)
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
        for layer in self.layers:
            if layer.self_attn.value_gate is not None:
                layer.self_attn.value_gate = CoordinateGate(read, config.num_key_value_heads, bias=False)
        if self.previous_token is not None:
            self.previous_token.gate = CoordinateGate(read, 1, bias=False)
        self.post_init()


class ModernGPTForCausalLM(StartsAsRecipesDo, RiGPTForCausalLM):
    """The baseline; trained with [`muon_param_groups`]."""

    config_class = ModernGPTConfig

    def __init__(self, config: ModernGPTConfig):
        super().__init__(config)
        self.model = ModernGPTModel(config)
        self.post_init()


def muon_param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, multipliers: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """
    Groups for [`EquivariantOptimizer`] that make of it Muon for the matrices inside of a model and AdamW for the rest.

    Args:
        model: Any causal language model.
        lr, weight_decay: Of all groups, in AdamW's units.
        multipliers: Of `lr`, by the end of a parameter's name or of its module.

    Raises:
        ValueError: if `multipliers` names nothing that there is.
    """
    multipliers = dict(multipliers or {})
    unused = set(multipliers)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    bare: Any = model
    while hasattr(bare, "module"):
        bare = bare.module
    tables.add(id(bare.get_output_embeddings().weight))
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pieces = name.split(".")[-2:]
        key = next((piece for piece in reversed(pieces) if piece in multipliers), None)
        unused.discard(key or "")
        factor = multipliers.get(key or "", 1.0)
        treatment = "polar" if parameter.dim() == 2 and id(parameter) not in tables else "elements"
        group = groups.setdefault(
            (treatment if parameter.dim() == 2 else "vector", factor),
            {
                "params": [],
                "treatment": treatment,
                "lr": lr * factor,
                "weight_decay": weight_decay if parameter.dim() == 2 else 0.0,
            },
        )
        group["params"].append(parameter)
    if unused:
        raise ValueError(
            f"`multipliers` must be keyed by modules of the model, got {', '.join(sorted(unused))}. Take names such "
            "as embed_tokens or lm_head."
        )
    return list(groups.values())


AutoConfig.register(ModernGPTConfig.model_type, ModernGPTConfig)
AutoModelForCausalLM.register(ModernGPTConfig, ModernGPTForCausalLM)
