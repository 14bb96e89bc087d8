"""
RiGPT with the norms that other models have, to find out what leaving the basis out of them costs or brings.

A gain per coordinate, and the bias and the mean of LayerNorm, each single out axes of the stream. Everything else is
RiGPT's, down to how the optimizer updates every matrix. Kept here and not among the options of a
`RiGPTConfig`, all of which leave the function invariant.
"""

from typing import Any, Literal

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, RiGPTModel
from rigpt_hf.decoder_rigpt import RiGPTRMSNorm
from rigpt_hf.optim import equivariant_param_groups
from rigpt_hf.training.kinds import KINDS, Kind


NORMS: dict[str, Any] = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}


class AffineNormConfig(RiGPTConfig):
    """
    A [`RiGPTConfig`] of another model.

    Args:
        stream_norm (`"rmsnorm"` or `"layernorm"`, *optional*, defaults to `"layernorm"`):
            With a gain per coordinate; the latter also with a bias, and without the mean of the coordinates.

    Raises:
        ValueError: if `stream_norm` is neither.
    """

    model_type = "affine-norm-rigpt"

    def __init__(self, stream_norm: Literal["rmsnorm", "layernorm"] = "layernorm", **options: Any):
        if stream_norm not in NORMS:
            raise ValueError(f"`stream_norm` must be one of {', '.join(NORMS)}, got {stream_norm!r}.")
        self.stream_norm = stream_norm
        super().__init__(**options)


class AffineNormModel(RiGPTModel):
    """The network below the head."""

    config_class = AffineNormConfig

    def __init__(self, config: AffineNormConfig):
        super().__init__(config)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, RiGPTRMSNorm):
                    setattr(module, name, NORMS[config.stream_norm](config.hidden_size, eps=config.rms_norm_eps))
        self.post_init()


class AffineNormForCausalLM(RiGPTForCausalLM):
    """The model; trained with [`affine_norm_param_groups`]."""

    config_class = AffineNormConfig

    def __init__(self, config: AffineNormConfig):
        super().__init__(config)
        self.model = AffineNormModel(config)
        self.post_init()


def affine_norm_param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, lr_multipliers: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """
    [`equivariant_param_groups`] for all that has a frame, and Adam without decay for gains and biases of norms.

    Args:
        model: An [`AffineNormForCausalLM`], also as DDP wraps it.
        lr, weight_decay, lr_multipliers: As there.
    """
    norms: list[nn.Module] = [module for module in model.modules() if type(module) in NORMS.values()]
    affine = [parameter for norm in norms for parameter in norm.parameters() if parameter.requires_grad]
    # The table of frames has no row for what has no frame, and is asked for what can be trained only.
    for parameter in affine:
        parameter.requires_grad_(False)
    try:
        groups = equivariant_param_groups(model, lr, weight_decay, lr_multipliers=lr_multipliers)
    finally:
        for parameter in affine:
            parameter.requires_grad_(True)
    return [*groups, {"params": affine, "update_rule": "coordinatewise", "lr": lr, "weight_decay": 0.0}]


AutoConfig.register(AffineNormConfig.model_type, AffineNormConfig)
AutoModelForCausalLM.register(AffineNormConfig, AffineNormForCausalLM)
KINDS["affine-norm-rigpt"] = Kind(AffineNormConfig, AffineNormForCausalLM, affine_norm_param_groups)
