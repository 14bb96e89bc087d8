"""Orders, axes and signs that weights determine by themselves: pure linear algebra behind `Group.orient`."""

from typing import Any

import torch

from .base import DEGENERATE, UNSIGNED, Note


def eigenbasis(gram: torch.Tensor, anchors: torch.Tensor, key: Any, note: Note) -> torch.Tensor:
    """
    Rows are the eigenvectors of `gram` `[n, n]`, by descending eigenvalue, with positive odd moment over `anchors`.

    Where eigenvalues coincide, the anchors `[N, n]` themselves, made orthogonal in their order, are the basis.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, rows = values.flip(0), vectors.flip(1).T.clone()
    gaps = (values[:-1] - values[1:]) / values[0].clamp_min(1e-300)
    for start, end in clusters(gaps):
        empty = float(values[start]) <= DEGENERATE * float(values[0])
        text = f"{end - start} equal eigenvalues in {key}" + (", all zero" if empty else "")
        note(key.kind, float(gaps[start : end - 1].min()), DEGENERATE, text)
        rows[start:end] = _orthogonalised(anchors @ rows[start:end].T, float(anchors.norm())) @ rows[start:end]
    if len(gaps):
        note(key.kind, float(gaps.min()), 0.0, "")
    coordinates = anchors @ rows.T
    moments = odd_moments(coordinates)
    filled = coordinates.norm(dim=0) > DEGENERATE * anchors.norm()  # elsewhere either sign is right
    if filled.any():
        weak = int((moments[filled].abs() < UNSIGNED).sum())
        note("signs", float(moments[filled].abs().min()), UNSIGNED, f"{weak} signs in {key}")
    return signs(moments)[:, None] * rows


def clusters(gaps: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of eigenvalues without a gap between neighbours, as half-open ranges of more than one."""
    runs, start = [], 0
    for index, gap in enumerate([*gaps.tolist(), 1.0]):
        if gap >= DEGENERATE:
            if index > start:
                runs.append((start, index + 1))
            start = index + 1
    return runs


def _orthogonalised(vectors: torch.Tensor, scale: float) -> torch.Tensor:
    """An orthogonal matrix `[m, m]` whose rows are the vectors `[N, m]`, orthogonalised in order; completed if few."""
    size = vectors.shape[1]
    rows: list[torch.Tensor] = []
    for vector in [*vectors, *torch.eye(size, dtype=vectors.dtype)]:
        if len(rows) == size:
            break
        for _ in range(2):  # once more, against rounding
            for previous in rows:
                vector = vector - (previous @ vector) * previous
        if vector.norm() > 1e-6 * max(scale, 1e-300) / len(vectors) ** 0.5:
            rows.append(vector / vector.norm())
    if len(rows) < size:
        raise torch.linalg.LinAlgError("the vectors are too large to be completed")
    return torch.stack(rows)


def odd_moments(coordinates: torch.Tensor) -> torch.Tensor:
    """Third moments along the columns of `[N, n]`, relative to the second: they turn their sign with the axis."""
    norms = coordinates.square().sum(dim=0).sqrt().clamp_min(1e-300)
    return (coordinates / norms).pow(3).sum(dim=0) * len(coordinates) ** 0.5


def signs(values: torch.Tensor) -> torch.Tensor:
    """-1 where `values` are negative, elsewhere 1, in float64."""
    return torch.where(values < 0, -1.0, 1.0).double()


def descending(values: torch.Tensor, spare: torch.Tensor, key: Any, note: Note) -> torch.Tensor:
    """The order that sorts `values`; where they coincide, `spare` decides."""
    values, order = values.sort(descending=True)
    if len(values) > 1:
        gaps = (values[:-1] - values[1:]) / values[0].clamp_min(1e-300)
        ties = int((gaps < DEGENERATE).sum())
        note(key.kind, float(gaps.min()), DEGENERATE, f"{ties} equal norms in {key}")
        for start, end in clusters(gaps):
            order[start:end] = order[start:end][spare[order[start:end]].argsort(descending=True)]
    return order


def order_of_planes(
    frequencies: torch.Tensor, strengths: torch.Tensor, key: Any, note: Note
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The order of planes by descending `|frequencies|` `[copies, planes]`, of equal ones by descending `strengths`, and
    which of the planes in that order have negative frequencies.
    """
    values, order = frequencies.abs().sort(dim=1, descending=True)
    gaps = values.diff(dim=1).abs() / values[:, :1].clamp_min(1e-300)
    if gaps.numel():
        note("planes", float(gaps.min()), DEGENERATE, f"two frequencies of a head in {key} are equal")
    # Stable sorts, the last one first: by strength inside runs of equal frequencies.
    by_strength = strengths.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    runs = torch.cat([torch.zeros_like(values[:, :1]), (gaps >= DEGENERATE).to(values).cumsum(dim=1)], dim=1)
    by_run = runs.gather(1, by_strength).sort(dim=1, stable=True).indices
    order = order.gather(1, by_strength.gather(1, by_run))
    return order, (frequencies < 0).gather(1, order)
