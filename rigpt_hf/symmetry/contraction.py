"""
One bilinear map behind everything that is measured in a frame: `Σ a bᵀ` over all parameters that carry it.

With weights twice it gives Gram matrices and conserved charges, with gradients and weights the pairing with
generators, with the weights of two models the cross-covariance that alignment needs.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..frames import FrameKey, Table
from ..groups import Group, Role
from ..table import NEURONS, Turned


Weights = Mapping[str, torch.Tensor]
# Where the stream begins, if that is a frame of its own.
ENTRY = FrameKey("entry")


def weights_of(model: nn.Module, dtype: torch.dtype | None = torch.float64) -> dict[str, torch.Tensor]:
    """
    The parameters of a model by name, tied ones once, detached, on the CPU, in `dtype` (`None`: unchanged).

    Raises:
        ValueError: if one of them is not finite.
    """
    weights = {name: weight.detach().to("cpu", dtype or weight.dtype) for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"`model` must have finite weights, got NaN or infinity in {name!r}. Check its training.")
    return weights


UNBALANCED = (
    "`model` must have weights of sizes that float64 can hold side by side, got some so much larger than others that "
    "frames of it are singular. See whether single rows of weights are damaged."
)


@contextmanager
def decomposable() -> Iterator[None]:
    """Turns the failure of a decomposition, which weights of impossible sizes bring about, into one line on them."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(UNBALANCED) from error


@dataclass(frozen=True)
class View:
    """
    Two sets of weights as seen from one frame, or from several that turn alike, such as all of the residual stream.

    Args:
        table: The table of both models' configuration.
        keys: The frames; of one group.
        a, b: Tensors by parameter name, such as weights or gradients; of the same names and shapes.
    """

    table: Table
    keys: tuple[FrameKey, ...]
    a: Weights
    b: Weights

    @property
    def key(self) -> FrameKey:
        """The frame, or the first of them."""
        return self.keys[0]

    @property
    def group(self) -> Group:
        """The group that acts on the frame."""
        return self.table.frames[self.key].group

    def walk(self, key: FrameKey) -> Iterator[tuple[str, Turned]]:
        """The parameters among `a` that carry a frame, with the entry of the table."""
        return ((name, turned) for name, turned in self.table.walk(key) if name in self.a)

    def pairs(self) -> Iterator[tuple[Role, torch.Tensor, torch.Tensor]]:
        """The role in which each axis carries the frame, and that axis of `a` and of `b`, `[length, rest]`."""
        for name, turned in self.walk(self.key):
            a, b = self.a[name], self.b[name]
            front = turned.unfold(a)
            yield turned.role, front, front if b is a else turned.unfold(b)

    @cached_property
    def grams(self) -> dict[Role, torch.Tensor]:
        """
        `Σ a bᵀ` by role, as the group makes it: `[copies, n, n]` for groups of matrices, one number per head or neuron
        for groups of permutations. On the CPU, wherever the weights are.
        """
        frame = self.table.frames[self.key]
        result: dict[Role, torch.Tensor] = {}
        for role, a, b in self.pairs():
            part = frame.group.gram(role, a, b, frame.copies).cpu()
            result[role] = result[role] + part if role in result else part
        return result

    def total(self) -> torch.Tensor:
        """
        `Σ a bᵀ` over vectors and covectors in all frames of the view, `[copies, n, n]`; without stacks, whose other
        side turns with a frame that is found after this one.
        """
        whole = {name for key in self.keys for name, turned in self.walk(key) if not turned.stacked}
        a = {name: self.a[name] for name in whole}
        parts = [
            gram
            for key in self.keys
            for role, gram in View(self.table, (key,), a, self.b).grams.items()
            if role in ("vector", "covector")
        ]
        return torch.stack(parts).sum(dim=0)

    def anchors(self) -> torch.Tensor:
        """
        All vectors `[N, copies · n]` of `a` in this frame that nothing else turns but what is canonical before it.

        For the residual stream, and the frame it may begin in, what tokens and positions put into it. For other
        spaces what only the stream and the order of key-value heads turn; of those that every query head has of its
        own, the sums over the query heads of a key-value head.
        """
        if self.key in (*self.table.streams, ENTRY):
            return token_vectors(self.table, self.a, "entry" if self.key == ENTRY else "stream")
        frame, vectors = self.table.frames[self.key], []
        allowed = {"heads", self.key.kind, frame.after, *(key.kind for key in self.table.streams)}
        for name, turned in self.walk(self.key):
            if turned.flat or any(other.key.kind not in allowed for other in self.table.turns(name)):
                continue
            rows = turned.unfold(self.a[name])
            size = frame.group.shape(1)[-1]
            summed = rows.reshape(frame.copies, -1, size, rows.shape[1]).sum(dim=1)
            vectors.append(summed.reshape(frame.copies * size, -1).T)
        return torch.cat(vectors)

    def carried(self) -> list[tuple[Group, list[tuple[Role, torch.Tensor, torch.Tensor]]]]:
        """For every frame whose copies this one exchanges, its group and the [`pairs`] that carry its vectors."""
        spaces = []
        for key, frame in self.table.frames.items():
            if frame.carrier == self.key.kind and key.layer == self.key.layer:
                inner = self.table.walk(key)
                # Not what yet another frame of the head turns, which is not known at this point.
                axes = {
                    (name, turned.dim)
                    for name, turned in inner
                    if turned.role in ("vector", "covector", *NEURONS) and not turned.stacked
                }
                pairs = [
                    (turned.role, turned.unfold(self.a[name]), turned.unfold(self.b[name]))
                    for name, turned in self.walk(self.key)
                    if (name, turned.dim) in axes
                ]
                spaces += [(frame.group, pairs)] if pairs else []
        return spaces


def views(table: Table, a: Weights, b: Weights, keys: Collection[FrameKey] | None = None) -> Iterator[View]:
    """Views from the frames (of `keys`, or all) that some of the parameters carry."""
    for key in table.carried:
        view = View(table, (key,), a, b)
        if (keys is None or key in keys) and any(True for _ in view.walk(key)):
            yield view


def token_vectors(table: Table, weights: Weights, kind: str = "stream") -> torch.Tensor:
    """
    Vectors `[N, d]` that tokens and positions put into the residual stream, and that no other frame touches; where it
    begins in a frame of its own (`kind="entry"`), into that, and into the stream what comes out of it.
    """
    rows = []
    for name, _ in table.carriers(FrameKey(kind), "vector"):
        if name in weights and table.role_on(name, kind) == "rows":
            rows.append(weights[name])
        elif name in weights and table.role_on(name, "entry") == "reads":
            rows.append(weights[name].T)
        elif name in weights and table.role_on(name, "lexical") == "reads":
            lexical = [token for token, _ in table.carriers(FrameKey("lexical"), "vector")]
            tokens = next(token for token in lexical if table.role_on(token, "lexical") == "rows")
            rows.append(weights[tokens] @ weights[name].T)
    return torch.cat(rows)
