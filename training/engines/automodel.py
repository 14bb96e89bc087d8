"""The equivariant optimizer for NVIDIA NeMo AutoModel: `_target_` of `optimizer` in a recipe (`automodel.yaml`).

AutoModel calls other optimizers with parameters alone, which do not say how they turn; its configurations are given
the model.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from nemo_automodel.components.optim.optimizer import OptimizerConfig
from torch import nn

from rigpt_hf.optim import EquivariantOptimizer
from rigpt_hf.trainer_optimizer import EquivariantFactory


@dataclass
class EquivariantConfig(OptimizerConfig):
    """
    The settings of [`EquivariantOptimizer`]; `lr_multipliers` as in [`equivariant_param_groups`].

    Raises:
        ValueError: for `param_group_overrides`, in whose place `lr_multipliers` are.
    """

    # Megatron-FSDP flattens parameters, and a flat piece has no frames.
    supports_megatron_fsdp_sharding: ClassVar[bool] = False

    lr: float = 1e-2
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    polar: str = "newton_schulz"
    steps: int = 5
    sharing: str = "auto"
    lr_multipliers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.param_group_overrides:
            raise ValueError(
                f"`param_group_overrides` must be left out, got {self.param_group_overrides}: the groups come from "
                "the table of frames. Pass `lr_multipliers`."
            )

    def build(
        self, model: nn.Module, *, device_mesh: Any = None, is_peft: bool = False
    ) -> list[torch.optim.Optimizer]:
        """An optimizer for each part of a model; where its shards lie, its parameters say."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "param_group_overrides"}
        return [in_order(EquivariantFactory()(part, **own)) for part in getattr(model, "parts", [model])]


def in_order(optimizer: EquivariantOptimizer) -> EquivariantOptimizer:
    """A group with the full rate and decay comes first: AutoModel's schedule takes all others relative to it."""
    optimizer.param_groups.sort(key=lambda group: (-group["weight_decay"], -group["lr"]))
    return optimizer
