"""RiGPT and the equivariant optimizer as a model of torchtitan's.

    torchrun --nproc-per-node 8 -m torchtitan.train --module rigpt_hf.training.engines.torchtitan_rigpt \\
        --config rigpt --hf-assets-path FOLDER

FOLDER has a RiGPT's `config.json` and its tokenizer, and may have weights to begin from. FSDP2 and HSDP; what else
torchtitan has for its own models is refused.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.trainer import Trainer

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.read import load_config
from rigpt_hf.trainer_optimizer import EquivariantFactory

from ..build import recompute_activations_
from ..diagnostics import flops_per_token
from ..sharding import restore_weights_, shard


# Of a parameter, before its name in the model that is inside.
PREFIX = "model."
# What torchtitan does through modules of its own, by section of its configuration: the values that leave it.
SUPPORTED: dict[str, dict[str, Any]] = {
    "parallelism": {
        "tensor_parallel_degree": 1,
        "pipeline_parallel_degree": 1,
        "context_parallel_degree": 1,
        "expert_parallel_degree": 1,
        "spmd_backend": "partial_dtensor",
        "fsdp_reshard_after_forward": "default",
    },
    "training": {"enable_cpu_offload": False, "disable_cuda_graphs": True},
    "compile": {"enable": False},
}


def check_supported(config: Any) -> None:
    """
    Raise if a run asks for what only torchtitan's own models have.

    Raises:
        ValueError: names the option of torchtitan, and the value that it must have.
    """
    for section, options in SUPPORTED.items():
        for name, value in options.items():
            if (given := getattr(getattr(config, section), name)) != value:
                raise ValueError(f"`{section}.{name}` must be {value!r} for a RiGPT, got {given!r}. Leave it out.")


class RiGPT(BaseModel):
    """A `RiGPTForCausalLM` that torchtitan builds, shards and fills."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        fields: dict[str, Any] = field(default_factory=dict)
        """Those of a `RiGPTConfig`; read from `hf_assets_path`."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            check_supported(config)
            self.fields = load_config(config.hf_assets_path, argument="hf_assets_path").to_diff_dict()

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            inner: Any = model.model
            return sum(parameter.numel() for parameter in model.parameters()), int(flops_per_token(inner, seq_len))

    def __init__(self, config: Config):
        super().__init__()
        self.model = RiGPTForCausalLM(RiGPTConfig(**config.fields))

    def verify_module_protocol(self) -> None:
        """Nothing: the modules inside are those of Transformers."""

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Random weights as everywhere, on every process whole for a moment: their law is that of whole matrices."""
        whole = RiGPTForCausalLM(self.model.config)
        self.model.tie_weights()
        restore_weights_(self.model, whole.state_dict())
        for name, buffer in whole.named_buffers():
            self.model.get_buffer(name).copy_(buffer)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[B, S, V]` of `tokens [B, S]`; positions that restart begin another document."""
        return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def parallelize(model: RiGPT, *, parallel_dims: Any, training: Any, ac_config: Any, **kwargs: Any) -> RiGPT:
    """FSDP2, or HSDP, of every layer; any activation checkpointing keeps the inputs of layers alone."""
    if ac_config is not None:
        recompute_activations_(model.model)
    axes = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    precision = "bf16" if training.mixed_precision_param == "bfloat16" else "no"
    shard(model.model, precision, parallel_dims.get_mesh(axes))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all processes
            module.set_force_sum_reduction_for_comms(True)  # all that Gloo has
    return model


class RiGPTNames(StateDictAdapter):
    """Names with the prefix in torchtitan and without it in a folder that `AutoModelForCausalLM` loads."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        is_tied = RiGPTConfig(**self.model_config.fields).tie_word_embeddings
        left_out = RiGPTForCausalLM._tied_weights_keys if is_tied else {}
        bare = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        return {name: tensor for name, tensor in bare.items() if name not in left_out}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {PREFIX + name: tensor for name, tensor in hf_state_dict.items()}


class EquivariantOptimizers(OptimizersContainer):
    """The equivariant optimizer, whose groups come from the table of frames and not from patterns of names."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        lr: float = 1e-2
        """Peak learning rate, in AdamW's units."""
        weight_decay: float = 0.1
        """Decoupled rate; not on vectors and numbers."""
        momentum: float = 0.95
        """Momentum of matrices."""
        lr_multipliers: dict[str, float] = field(default_factory=dict)
        """Factors of the rate, by update rule or module."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        if config.param_groups or config.optimizer_factory_kwargs_by_name:
            raise ValueError("`optimizer.param_groups` come from the table of frames, got others. Leave them out.")
        names = ("lr", "weight_decay", "momentum", "lr_multipliers")
        options = {name: getattr(config, name) for name in names}
        self.model_parts = model_parts
        self.optimizers = [EquivariantFactory()(part.model, **options) for part in model_parts]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:  # by which checkpoints know them
            group["param_names"] = [PREFIX + name for name in group["names"]]
        self._post_init([parameter for group in groups for parameter in group["params"]])


def rigpt() -> Trainer.Config:
    """A run of torchtitan's; its command line changes every option but the model, which `--hf-assets-path` names."""
    return Trainer.Config(
        model_spec=ModelSpec(
            name="rigpt",
            flavor="hf_assets_path",
            model=RiGPT.Config(),
            parallelize_fn=parallelize,
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=RiGPTNames,
        ),
        loss=CrossEntropyLoss.Config(),
        optimizer=EquivariantOptimizers.Config(),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=40, decay_ratio=0.5, min_lr_factor=0.02),
        training=TrainingConfig(seq_len=1024, disable_cuda_graphs=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        checkpoint=CheckpointManager.Config(),
        activation_checkpoint=None,
    )
