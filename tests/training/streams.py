"""Turning the stream of a model by hand, as it has parts that the table of frames does not know."""

import torch
from torch import nn


@torch.no_grad()
def turn_the_stream_(model: nn.Module, rotation: torch.Tensor) -> None:
    """All maps that read from the stream of a model of RiGPT's layout or write to it; not what acts on coordinates."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.up_proj):
            reader.weight.copy_(reader.weight @ rotation.T)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(rotation @ writer.weight)
    if model.model.project_out is not None:
        model.model.project_in.weight.copy_(rotation @ model.model.project_in.weight)
        model.model.project_out.weight.copy_(model.model.project_out.weight @ rotation.T)
        return
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.copy_(table.weight @ rotation.T)
