"""
Statistics that say how alike two models are: larger means more alike. Another one is a line in `STATISTICS`.

`raw spectra` are the singular values of the stored matrices. `AWM` is the statistic of Zeng et al., "AWM: Accurate
Weight-Matrix Fingerprint for Large Language Models" (ICLR 2026, arXiv 2510.06738), written anew from what the paper
says: dimensions of the stream are matched by an assignment of the columns of the embeddings, up to signs; maps to
queries and keys are then compared by centred kernel alignment without bias (Song et al., JMLR 13, 2012; Kornblith et
al., arXiv 1905.00414), as samples the dimensions that were matched, which rotations of heads leave alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion.families import architecture_of
from rigpt_hf.conversion.maps import module_of
from rigpt_hf.groups import assignment
from rigpt_hf.symmetry import Fingerprint, compare, fingerprint

from .derive import as_rigpt


Matrices = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Statistic:
    """
    How alike two models are.

    Args:
        prepare (`Callable`): what is kept of a model, so that it is looked at once.
        likeness (`Callable`): of what is kept of A and of B; larger is more alike, `None` if it cannot say.
    """

    prepare: Callable[[Any], Any]
    likeness: Callable[[Any, Any], float | None]

    def __call__(self, a: Any, b: Any) -> float | None:
        """How alike two models are."""
        return self.likeness(self.prepare(a), self.prepare(b))


@torch.no_grad()
def stored_matrices(model: Any) -> Matrices:
    """
    The matrices of a model as it is stored, `[out, in]`, nothing folded, by the module of a RiGPT that each becomes.

    A table of tokens is `[vocabulary, stream]`.
    """
    weights = {module_of(name)[0]: tensor for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    if isinstance(model, RiGPTForCausalLM):
        return {module: weight.double() for module, weight in weights.items()}
    architecture = architecture_of(model.config, type(model).__name__)
    found = {}
    for rule, _ in architecture.family_of(model.config).expand(architecture.result(model.config)):
        if rule.source in weights:
            whole = weights[rule.source].T if rule.transposed else weights[rule.source]
            found[rule.target] = (whole if rule.rows is None else rule.rows(model.config).take(whole)).double()
    return found


def spectra(model: Any) -> Matrices:
    """The singular values of every stored matrix, sorted, with squares that sum to 1."""
    values = {module: torch.linalg.svdvals(matrix) for module, matrix in stored_matrices(model).items()}
    return {module: each / each.norm().clamp_min(1e-300) for module, each in values.items()}


def likeness_of_spectra(a: Matrices, b: Matrices) -> float | None:
    """1 minus the mean distance between the spectra of matrices at one place in both."""
    distances = []
    for module in a.keys() & b.keys():
        long, short = sorted((a[module], b[module]), key=len, reverse=True)
        padded = torch.cat((short, short.new_zeros(len(long) - len(short))))
        distances.append(float((long - padded).norm()))
    return 1 - sum(distances) / len(distances) if distances else None


def likeness_of_queries_and_keys(a: Matrices, b: Matrices) -> float | None:
    """AWM: the mean over layers, of queries and keys, of the unbiased alignment of kernels, once dimensions match."""
    places, signs = matched(a["model.embed_tokens"], b["model.embed_tokens"])
    kinds = ("q_proj", "k_proj")
    sides = [[[m for name, m in side.items() if name.endswith(f".{kind}")] for kind in kinds] for side in (a, b)]
    likenesses = []
    for first, second in zip(*sides, strict=True):
        turned = [matrix[:, places[1]] * signs for matrix in second]
        kernels = [[_centred(m.T @ m) for m in side] for side in ([m[:, places[0]] for m in first], turned)]
        table = torch.tensor([[_alignment(x, y) for y in kernels[1]] for x in kernels[0]]).abs()
        # Layers that were dropped leave the others where the assignment finds them.
        table = table if len(table) <= len(table.T) else table.T
        order = torch.arange(len(table)) if len(table) == len(table.T) else _assigned(table)
        likenesses.append(float(table[torch.arange(len(table)), order].mean()))
    return sum(likenesses) / len(likenesses)


def matched(a: torch.Tensor, b: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    Which dimensions of two tables of tokens `[V, d]` belong together, and with which signs.

    Of tables of two lengths the tokens are compared that both have, and of two widths as many dimensions as the
    narrower has.
    """
    tokens = min(len(a), len(b))
    columns = [table[:tokens] / table[:tokens].norm(dim=0).clamp_min(1e-300) for table in (a, b)]
    cosines = columns[0].T @ columns[1]
    if len(cosines) <= len(cosines.T):
        rows, others = torch.arange(len(cosines)), _assigned(cosines.abs())
    else:
        others, rows = torch.arange(len(cosines.T)), _assigned(cosines.T.abs())
    return (rows, others), cosines[rows, others].sign()


def _assigned(gains: torch.Tensor) -> torch.Tensor:
    """The columns of a table that is no longer than wide with the largest sum, one for each row."""
    square = gains.new_zeros(len(gains.T), len(gains.T))
    square[: len(gains)] = gains
    return assignment(square)[: len(gains)]


def _centred(kernel: torch.Tensor) -> torch.Tensor:
    """
    A kernel `[n, n]` whose inner product with another, divided by `n (n - 3)`, is the unbiased estimate of their
    dependence: U-centred, with zeros on the diagonal (Székely and Rizzo, Annals of Statistics 42, 2014).
    """
    n = len(kernel)
    hollow = kernel - kernel.diag().diag()
    rows = hollow.sum(0) / (n - 2)
    centred = hollow - rows[:, None] - rows[None] + hollow.sum() / ((n - 1) * (n - 2))
    return centred - centred.diag().diag()


def _alignment(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))


def likeness_after_alignment(a: RiGPTForCausalLM, b: RiGPTForCausalLM) -> float | None:
    """1 minus the distance of aligned layers, in units of that of orthogonal ones; `None` if shapes differ."""
    layers = compare(a, b, search="always").layers
    return None if layers is None else 1 - layers.distance / 2**0.5


def likeness_of_fingerprints(a: Fingerprint, b: Fingerprint) -> float:
    """1 minus the distance of the fingerprints."""
    return 1 - a.distance(b)


# The same with other questions, as `rigpt diff` has for every pair; no choice was made by what they answer.
FINGERPRINT, OTHER_PROBES = "fingerprint", "other probes"
STATISTICS: Mapping[str, Statistic] = {
    "raw spectra": Statistic(spectra, likeness_of_spectra),
    "AWM": Statistic(stored_matrices, likeness_of_queries_and_keys),
    FINGERPRINT: Statistic(lambda model: fingerprint(as_rigpt(model)), likeness_of_fingerprints),
    OTHER_PROBES: Statistic(lambda model: fingerprint(as_rigpt(model), salt=1), likeness_of_fingerprints),
    "alignment": Statistic(as_rigpt, likeness_after_alignment),
}
