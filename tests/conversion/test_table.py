"""What else lists how parameters turn follows from the table of frames."""

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.frames import table_of

from ..models import SYMMETRIES, over, tiny_config


STYLES = {"writes": "colwise", "reads": "rowwise", "rows": "embedding_colwise"}


@over(SYMMETRIES, ())
@pytest.mark.by_default(32)
def test_the_tensor_parallel_plan_is_that_of_heads_and_neurons(option):
    """It travels with checkpoints, which know no table."""
    config = tiny_config(**SYMMETRIES[option])
    with torch.device("meta"):
        model = RiGPTForCausalLM(config)
    table, expected = table_of(config), {}
    # A process has all heads where the length of all is asked for, and where they share one thing and not another.
    shared = config.qk_norm_gain == "vector" and config.qk_norm_bias
    together = config.qk_norm_over == "all" or shared
    if together:
        styles = ("colwise_gather_output",) * 3 + ("rowwise_split_input",)
        expected = {f"layers.*.self_attn.{of}_proj": style for of, style in zip("qkvo", styles, strict=True)}
    for name, _ in model.model.layers.named_parameters():
        kinds = ("heads", "neurons", "shared_neurons")
        roles = {table.role_on(f"model.layers.{name}", kind) for kind in kinds} - {None}
        if together and ".self_attn." in name:
            continue
        if roles and not name.endswith("proj.bias"):
            layer, _, module = name.removesuffix(".weight").partition(".")
            # What is no linear layer is a parameter by itself.
            linear = isinstance(model.model.layers.get_submodule(name.rpartition(".")[0]), nn.Linear | nn.Embedding)
            alone = not linear and name.endswith(".weight")
            expected[f"layers.*.{module}{'.weight' if alone else ''}"] = STYLES[roles.pop()]
            assert not roles and layer.isdigit()
        elif not roles and table.role_on(f"model.layers.{name}", "gains"):  # which all heads share
            module = name.removesuffix(".weight").partition(".")[2]
            expected[f"layers.*.{module}"] = "replicated_with_grad_allreduce"
    assert config.base_model_tp_plan == expected and len(expected) >= (6 if config.num_experts is None else 4)
