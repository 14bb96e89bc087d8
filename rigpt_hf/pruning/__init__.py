"""Smaller models: fewer neurons, heads, and dimensions of heads."""

from .prune import Sizes, prune
from .recovery import recovered


__all__ = ["Sizes", "prune", "recovered"]
