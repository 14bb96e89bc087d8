"""The data of pretraining: sources of text, shards of tokens, the order of windows, batches."""

from .batches import Windows, packed, validation_batches
from .manifest import Manifest
from .order import window_index
from .shards import TokenShards, from_tokens, prepare, split_of


__all__ = [
    "Manifest",
    "TokenShards",
    "Windows",
    "from_tokens",
    "packed",
    "prepare",
    "split_of",
    "validation_batches",
    "window_index",
]
