"""The equivariant optimizer, under its stable name; the code is in `rigpt_hf/optimizer/`."""

from .optimizer.groups import UPDATE_RULES, Update, config_of, equivariant_param_groups, unwrapped_name, update_of
from .optimizer.sharing import full_tensor, shard_like
from .optimizer.step import EquivariantOptimizer


__all__ = [
    "UPDATE_RULES",
    "EquivariantOptimizer",
    "Update",
    "config_of",
    "equivariant_param_groups",
    "full_tensor",
    "shard_like",
    "unwrapped_name",
    "update_of",
]
