"""Smaller models: fewer neurons, heads, and dimensions of heads."""

from .prune import Sizes, prune
from .recovery import check_recovery, recovered


__all__ = ["Sizes", "check_recovery", "prune", "recovered"]
