"""The update rule of every parameter, read from the table of frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import Table, table_of
from ..table import NEURONS


UpdateRule = Literal["polar", "rows", "vectors", "coordinatewise"]
UPDATE_RULES: tuple[UpdateRule, ...] = ("polar", "rows", "vectors", "coordinatewise")


@dataclass(frozen=True)
class Update:
    """
    How a parameter is updated.

    Args:
        rule: One of `UPDATE_RULES`.
        blocks: Into how many parts it falls that are treated by themselves, one per head.
        dim: The axis along which it falls into them.
    """

    rule: UpdateRule
    blocks: int = 1
    dim: int = 0


def update_of(table: Table, name: str) -> Update:
    """
    How the parameter `name` is updated, read from the table of frames.

    Raises:
        ValueError: if the table of frames has no such parameter.
    """
    # Number of vectors that each axis holds, each of a frame of its own; 0 if it holds none.
    parts = [0] * table.rank(name)
    stacked = any(turned.stacked for turned in table.turns(name))
    for turned in table.turns(name):
        if turned.role in ("vector", "covector") or (turned.role in NEURONS and table.frames[turned.key].copies > 1):
            parts[turned.dim] = table.frames[turned.key].copies
        elif parts[turned.dim] and turned.role == "query":
            parts[turned.dim] = table.frames[turned.key].group.count("query")
    if stacked:  # what is a length, in each head, as a gain would say it
        return Update("vectors", parts[0])
    if len(parts) == 1:
        return Update("vectors", parts[0]) if parts[0] else Update("coordinatewise")
    if len({turned.dim for turned in table.turns(name)}) < len(parts):
        return Update("rows")
    # Neurons only change places, but a matrix from or to a frame has them on its other side.
    dim = 1 if parts[1] > max(parts[0], 1) else 0
    return Update("polar", max(parts[dim], 1), dim)


def equivariant_param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    *,
    lr_multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """
    Groups of a model's trainable parameters by update rule, read from the table of frames.

    Weight decay applies to matrices and tables; vectors and single numbers have none, as is usual.

    Args:
        model: A RiGPT, also as DDP, FSDP2 or `torch.compile` wrap it.
        lr: Learning rate as one would give it to AdamW.
        weight_decay: Decoupled, as a rate: a step takes `lr · weight_decay` of the weights away.
        lr_multipliers: Factors of `lr`, by update rule (`"rows"`) or by the end of a parameter's name
            (`"distance_weight"`) or module (`"embed_tokens"`), which go first; 1 if not given.

    Raises:
        ValueError: if the model is no RiGPT, the table of frames lacks a parameter, or `lr_multipliers` names nothing
            that there is.
    """
    config = config_of(model)
    # By name, as a class that came with a checkpoint's own code is another one.
    if not any(getattr(kind, "model_type", None) == RiGPTConfig.model_type for kind in type(config).__mro__):
        raise ValueError(
            f"`model` must be a RiGPT, got a {type(model).__name__} with a {type(config).__name__}, which is not in "
            "the table of frames. Convert it with `rigpt convert`, or use another optimizer."
        )
    lr_multipliers = dict(lr_multipliers or {})
    unused = set(lr_multipliers)
    table = table_of(config)
    groups: dict[tuple[Update, float], dict[str, Any]] = {}
    for wrapped, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = unwrapped_name(wrapped)
        update = update_of(table, name)
        pieces = name.split(".")[-2:]  # module and parameter
        key = next((piece for piece in reversed(pieces) if piece in lr_multipliers), update.rule)
        unused -= {*pieces, update.rule}
        factor = lr_multipliers.get(key, 1.0)
        group = groups.setdefault(
            (update, factor),
            {
                "params": [],
                "names": [],
                "shapes": [],
                "update_rule": update.rule,
                "blocks": update.blocks,
                "dim": update.dim,
                "lr": lr * factor,
                "weight_decay": weight_decay if update.rule in ("polar", "rows") else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        group["shapes"].append(list(parameter.shape))
    if unused - set(UPDATE_RULES):
        raise ValueError(
            f"`lr_multipliers` must be keyed by {', '.join(UPDATE_RULES)} or modules of the model, got "
            f"{', '.join(sorted(unused - set(UPDATE_RULES)))}. Take names such as embed_tokens or q_proj."
        )
    return list(groups.values())


def config_of(model: nn.Module) -> Any:
    """The configuration of a model, whatever is wrapped around it."""
    while not hasattr(model, "config"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise ValueError(
                f"`model` must be a RiGPT, got a {type(model).__name__} without a configuration. Pass the model."
            )
        model = inner
    return model.config


def unwrapped_name(name: str) -> str:
    """The name of a parameter without what DDP, `torch.compile` and activation checkpointing put into it."""
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(piece for piece in name.split(".") if piece not in wrappers)
