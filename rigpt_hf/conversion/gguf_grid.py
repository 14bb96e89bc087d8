"""
Numbers that lie on a grid of GGUF already: codes that were chosen with care are stored as they are, not chosen anew.

A block of 32 neighbours is `d q` with `d` in float16: `q` from -8 to 7 in Q4_0, from -128 to 127 in Q8_0. The largest
of a block is `d` times one of few whole numbers, so each of these is tried. Where codes have a scale for a whole row,
its blocks repeat it, or a multiple of it.
"""

import numpy as np


BLOCK = 32
REACH = {"Q4_0": 8, "Q8_0": 128}


def on_grid(numbers: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Scales and codes of blocks that lie on a grid.

    Args:
        numbers (`np.ndarray` of shape `[..., n]`): in float32, n a multiple of 32.
        kind (`str`): a key of `REACH`.

    Returns:
        `tuple`: scales `[B]` of float16 and codes `[B, 32]` of int8, and of which of the B blocks they are exact.
    """
    blocks = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1, BLOCK)
    reach = REACH[kind]
    places = np.abs(blocks).argmax(axis=1)
    largest = np.take_along_axis(blocks, places[:, None], axis=1)[:, 0]
    scales, codes = np.zeros(len(blocks), np.float16), np.zeros(blocks.shape, np.int8)
    exact = largest == 0
    left = np.flatnonzero(~exact & np.isfinite(largest))
    for code in range(reach, 0, -1):
        # Only a negative code is as large as that.
        ends = -largest[left] if code == reach else np.abs(largest[left])
        with np.errstate(over="ignore"):
            tried = (ends / code).astype(np.float16)
        fits = np.abs(tried.astype(np.float32)) * code == np.abs(ends)
        fits &= tried != 0
        some, steps = left[fits], tried[fits]
        found = np.rint(blocks[some] / steps.astype(np.float32)[:, None])
        good = (found >= -reach).all(axis=1) & (found < reach).all(axis=1)
        good &= (found * steps.astype(np.float32)[:, None] == blocks[some]).all(axis=1)
        scales[some[good]], codes[some[good]], exact[some[good]] = steps[good], found[good].astype(np.int8), True
        left = np.flatnonzero(~exact & np.isfinite(largest))
        if not len(left):
            break
    return scales, codes, exact


def as_bytes(scales: np.ndarray, codes: np.ndarray, kind: str) -> np.ndarray:
    """Blocks `[B, bytes]` as a file has them; in Q4_0 the first half of a block has the low bits of its bytes."""
    if kind == "Q4_0":
        shifted = (codes + 8).astype(np.uint8)
        packed = shifted[:, : BLOCK // 2] | (shifted[:, BLOCK // 2 :] << 4)
    else:
        packed = codes.view(np.uint8)
    return np.concatenate((scales[:, None].view(np.uint8), packed), axis=1)


def encoded(numbers: np.ndarray, kind: str, rounded: np.ndarray) -> tuple[np.ndarray, bool]:
    """
    The bytes of a tensor, with the codes of every block that lies on the grid.

    Args:
        numbers (`np.ndarray` of shape `[..., n]`), kind (`str`): as for [`on_grid`].
        rounded (`np.ndarray`): the bytes of the same tensor, rounded as the library of GGUF does it.

    Returns:
        `tuple`: bytes in the shape of `rounded`, and whether all of them are exact.
    """
    scales, codes, exact = on_grid(numbers, kind)
    blocks = rounded.reshape(len(exact), -1).copy()
    blocks[exact] = as_bytes(scales[exact], codes[exact], kind)
    return blocks.reshape(rounded.shape), bool(exact.all())
