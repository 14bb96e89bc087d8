"""Smaller models: fewer neurons, heads, and dimensions of heads."""

from .prune import Sizes, prune


__all__ = ["Sizes", "prune"]
