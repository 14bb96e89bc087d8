"""The order in which windows are trained on: an endless sequence of shuffled epochs that needs no memory."""

import math
from typing import Any, TypeVar

import numpy as np


ROUNDS = 8
Position = TypeVar("Position", int, np.ndarray)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiples of it spread evenly over 64 bits


def window_index(position: Position, windows: int, seed: int) -> Position:
    """
    The window that comes at a position of an endless sequence of epochs.

    Epoch e covers the positions `e * windows` to `(e + 1) * windows - 1` and holds every window once, in an order that
    depends on (seed, e) and on nothing else.

    Args:
        position (`int` or `np.ndarray` of integers, any shape): From 0.
        windows (`int`): How many there are.
        seed (`int`): Of the order.

    Returns:
        `int`, or `np.ndarray` of int64 and the shape of `position`, from 0 to `windows - 1`.

    Raises:
        ValueError: if there are no windows, or a position is negative.
    """
    positions = np.atleast_1d(np.asarray(position, dtype=np.int64))
    if windows < 1:
        raise ValueError(f"`windows` must be at least 1, got {windows}.")
    if positions.size and positions.min() < 0:
        raise ValueError(f"`position` must not be negative, got {positions.min()}.")
    epochs, places = np.divmod(positions, windows)
    keys = _mix(_mix(np.full(1, seed % 2**64, dtype=np.uint64)) + epochs.astype(np.uint64))
    # A keyed bijection gives any place of a permutation by itself. A stored permutation would take 8 bytes a window
    # on every process, and as long to make again at each resumption.
    places, size = places.astype(np.uint64), np.uint64(windows)
    result = _permute(places, keys, windows)
    # The network permutes slightly more numbers than there are windows. One that lands outside goes on until it is
    # back inside (cycle walking), which keeps the map a bijection.
    while (outside := result >= size).any():
        result[outside] = _permute(result[outside], keys[outside], windows)
    indices: Any = result.astype(np.int64)
    if np.ndim(position) == 0:
        indices = int(indices[0])
    return indices


def _permute(numbers: np.ndarray, keys: np.ndarray, windows: int) -> np.ndarray:
    """
    A generalised Feistel network over `rows * columns`, the least such product of nearly equal factors.

    FE1 of Black and Rogaway, "Ciphers with arbitrary finite domains", 2002. Each round adds to one half what depends
    on the other half alone, and so can be undone.

    Args:
        numbers, keys (`np.ndarray` of uint64 and one shape): each number is permuted by its own key.
        windows (`int`): how many numbers there must be at least.
    """
    rows = math.isqrt(windows - 1) + 1
    columns = -(-windows // rows)
    halves, sizes = list(np.divmod(numbers, np.uint64(columns))), (np.uint64(rows), np.uint64(columns))
    for turn in range(ROUNDS):
        this, other = turn % 2, 1 - turn % 2
        keys = _mix(keys)
        noise = _mix(keys + halves[other])
        halves[this] = (halves[this] + noise % sizes[this]) % sizes[this]
    return halves[0] * sizes[1] + halves[1]


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): each bit of the result depends on all bits given."""
    numbers = numbers + GOLDEN
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
