"""Muon for the matrices inside of a model and AdamW for the rest, of any causal language model."""

from typing import Any

from torch import nn


def muon_param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, lr_multipliers: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """
    Groups for [`EquivariantOptimizer`] that make of it Muon for the matrices inside of a model and AdamW for the rest.

    Args:
        model: Any causal language model.
        lr, weight_decay: Of all groups, in AdamW's units.
        lr_multipliers: Of `lr`, by the end of a parameter's name or of its module.

    Raises:
        ValueError: if `lr_multipliers` names nothing that there is.
    """
    lr_multipliers = dict(lr_multipliers or {})
    unused = set(lr_multipliers)
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
        key = next((piece for piece in reversed(pieces) if piece in lr_multipliers), None)
        unused.discard(key or "")
        factor = lr_multipliers.get(key or "", 1.0)
        rule = "polar" if parameter.dim() == 2 and id(parameter) not in tables else "coordinatewise"
        group = groups.setdefault(
            (rule if parameter.dim() == 2 else "vector", factor),
            {
                "params": [],
                "update_rule": rule,
                "lr": lr * factor,
                "weight_decay": weight_decay if parameter.dim() == 2 else 0.0,
            },
        )
        group["params"].append(parameter)
    if unused:
        raise ValueError(
            f"`lr_multipliers` must be keyed by modules of the model, got {', '.join(sorted(unused))}. Take names "
            "such as embed_tokens or lm_head."
        )
    return list(groups.values())
