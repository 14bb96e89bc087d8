"""A stock model whose hidden space is rotated while its norms cannot follow: the control beside a RiGPT."""

import copy
from typing import Any

import torch

from ..frames import table_of
from .families import architecture_of
from .maps import module_of


@torch.no_grad()
def rotate_stock(model: Any, rotation: torch.Tensor) -> Any:
    """
    A copy of a stock model whose stream weights are turned by `rotation` `[d, d]` while its norms stay as they are.

    Everything that writes into the stream turns along, and everything that reads it turns back, exactly as a gauge
    transformation does in a RiGPT. Only the gains and biases of the norms cannot follow: they act on coordinates.
    """
    turned, rotation = copy.deepcopy(model), rotation.to(model.device, torch.float64)
    architecture = architecture_of(model.config, type(model).__name__)
    config, family = architecture.result(model.config, None), architecture.family_of(model.config)
    table, modules = table_of(config), dict(turned.named_modules())
    names = {module_of(name): name for name in table.names}
    # Embeddings with maps of their own into the stream and back are no vectors of it.
    has_maps = any(rule.target == "model.project_in" and rule.source for rule in family.rules)
    done: set[str | None] = {family.embedding, family.head} if has_maps else set()
    for rule, layer in family.expand(config):
        role = table.role_on(names[rule.target, "weight"], "stream")
        if role is None and layer >= 0:  # it stands in a head, or in front of a norm with gains
            continue
        is_tied = rule.source == family.head and model.config.tie_word_embeddings
        if rule.source not in modules or rule.source in done or is_tied:
            continue
        done.add(rule.source)
        module = modules[rule.source]
        weight = module.weight.to(torch.float64)
        if role == "writes":
            weight = weight @ rotation.T if rule.transposed else rotation @ weight
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(rotation @ module.bias.to(torch.float64))
        else:
            weight = rotation @ weight if rule.transposed else weight @ rotation.T
        module.weight.copy_(weight)
    for name, parameter in turned.named_parameters():
        if parts := family.experts.shapes(name, tuple(parameter.shape)):
            maps = family.experts.maps(parameter.to(torch.float64), len(parts))
            for part, (own, stack) in enumerate(zip(parts, maps, strict=True)):
                match table.role_on(own, "stream"):
                    case "writes":
                        maps[part] = rotation @ stack
                    case "reads":
                        maps[part] = stack @ rotation.T
            parameter.copy_(family.experts.join(maps, tuple(parameter.shape)))
    return turned
