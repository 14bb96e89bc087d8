"""
Smaller heads: the maps onto fewer dimensions of queries and keys, and of values, after which least is lost.

A pair of maps `(P, Q)`, each `[R, h]`, takes the place of an element of the head's frame and of its inverse
transpose: vectors become `P x`, covectors `Q y`, and `Qᵀ P` is the projection that changes least, measured by moments.
With `R = h` it is a change of frames, to that in which the moments are equal and diagonal.
"""

import torch


# Directions whose moments are below this part of the largest were never seen, and count as absent.
FLOOR = 1e-10


def roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square roots of moments `[..., h, h]`, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(moments.double())
    seen = values > FLOOR * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    sizes = torch.where(seen, values, 0.0).sqrt()
    inverses = torch.where(seen, 1 / sizes, 0.0)
    return (vectors * sizes[..., None, :]) @ vectors.mT, (vectors * inverses[..., None, :]) @ vectors.mT


def pairing_maps(queries: torch.Tensor, keys: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Maps of queries and of keys `[copies, R, h]`, after which their products change least.

    Args:
        queries, keys: `[copies, h, h]`, second moments; of the queries of one key-value head, summed.
        rank: R.
    """
    (of_queries, from_queries), (of_keys, from_keys) = roots(queries), roots(keys)
    left, sizes, right = torch.linalg.svd(of_queries @ of_keys)
    scale = sizes[:, :rank].sqrt()[:, :, None]
    return scale * (left.mT[:, :rank] @ from_queries), scale * (right[:, :rank] @ from_keys)


def value_maps(outputs: torch.Tensor, moments: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Maps of values and of what reads them `[copies, R, h]`, after which what is written changes least.

    Args:
        outputs: `[copies, m, h]`, the maps that read the values of each head, on top of each other.
        moments: `[copies, h, h]`, second moments of what they read.
        rank: R.
    """
    root, inverse = roots(moments)
    _, _, right = torch.linalg.svd(outputs.double() @ root, full_matrices=False)
    return right[:, :rank] @ inverse, right[:, :rank] @ root


def plane_choice(queries: torch.Tensor, keys: torch.Tensor, planes: int, count: int) -> torch.Tensor:
    """
    The planes of each head that positions turn and that are worth most, `[copies, count]`, ascending: by the mean
    squares of queries in them times those of keys.

    Args:
        queries, keys: `[copies, h, h]`, second moments.
        planes: Their number; plane i lies in dimensions i and i + `planes`.
        count: How many to choose.
    """
    squares = [
        side.diagonal(dim1=1, dim2=2)[:, : 2 * planes].unflatten(1, (2, planes)).sum(dim=1) for side in (queries, keys)
    ]
    return (squares[0] * squares[1]).topk(count).indices.sort(dim=1).values
