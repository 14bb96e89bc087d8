"""What a rotation does to a stock model, whose norms cannot follow: the control beside what a RiGPT keeps."""

import copy
from typing import Any

import torch

from .families import architecture_of
from .maps import Role


@torch.no_grad()
def rotate_stock(model: Any, rotation: torch.Tensor) -> Any:
    """
    A copy of a stock model whose stream weights are turned by `rotation` `[d, d]` while its norms stay as they are.

    Everything that writes into the stream turns along, and everything that reads it turns back, exactly as a gauge
    transformation does in a RiGPT. Only the gains and biases of the norms cannot follow: they act on coordinates.
    """
    turned, rotation = copy.deepcopy(model), rotation.to(model.device, torch.float64)
    architecture = architecture_of(model.config, type(model).__name__)
    family, done = architecture.family, set()
    for rule, _ in family.expand(model.config.num_hidden_layers, model.config.tie_word_embeddings):
        if rule.source is None or rule.source in done:
            continue
        done.add(rule.source)
        module = turned.get_submodule(rule.source)
        weight = module.weight.to(torch.float64)
        transposed = family.is_transposed(rule.source)
        if rule.role is Role.WRITER:
            weight = weight @ rotation.T if transposed else rotation @ weight
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(rotation @ module.bias.to(torch.float64))
        else:
            weight = rotation @ weight if transposed else weight @ rotation.T
        module.weight.copy_(weight)
    return turned
