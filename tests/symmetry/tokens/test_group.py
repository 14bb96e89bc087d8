"""Finite groups, their elements, means and irreducible representations, against what is known of them."""

import math

import numpy as np
import pytest
import torch
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, DihedralGroup, SymmetricGroup

from rigpt_hf.symmetry.tokens import FiniteGroup, OrderError
from tests.symmetry.options import generator
from tests.symmetry.tokens.groups import quaternions
from tests.tolerances import SYMMETRY


# Dimension and kind (1 real, 2 complex, 4 quaternionic) of the real irreducibles, from tables of characters.
KNOWN = {
    "C2": (CyclicGroup(2), [(1, 1), (1, 1)]),
    "C4": (CyclicGroup(4), [(1, 1), (1, 1), (2, 2)]),
    "S3": (SymmetricGroup(3), [(1, 1), (1, 1), (2, 1)]),
    "D5": (DihedralGroup(5), [(1, 1), (1, 1), (2, 1), (2, 1)]),
    "A4": (AlternatingGroup(4), [(1, 1), (2, 2), (3, 1)]),
    "Q8": (quaternions(), [(1, 1)] * 4 + [(4, 4)]),
    "S4": (SymmetricGroup(4), [(1, 1), (1, 1), (2, 1), (3, 1), (3, 1)]),
    "A5": (AlternatingGroup(5), [(1, 1), (3, 1), (3, 1), (4, 1), (5, 1)]),
    # More elements than characters are compared on.
    "C60": (CyclicGroup(60), [(1, 1), (1, 1)] + [(2, 2)] * 29),
}


def group(name: str) -> FiniteGroup:
    return FiniteGroup(np.array([one.array_form for one in KNOWN[name][0].generators]))


@pytest.mark.parametrize("name", KNOWN)
def test_irreducibles_are_those_that_are_known(name):
    here, (there, expected) = group(name), KNOWN[name]
    assert here.order == len(here.elements) == there.order() == math.prod(map(len, here.chain))
    found = here.irreducibles
    assert [(one.dim, one.kind) for one in found] == expected and (found[0].character - 1).abs().max() < SYMMETRY[
        torch.float64
    ]
    tolerance = SYMMETRY[torch.float64]
    for one in found:
        unit = torch.eye(one.dim).double()
        assert (one.matrices @ one.matrices.mT - unit).abs().max() < tolerance
        # A homomorphism: products of elements are products of matrices.
        draws = torch.randint(here.order, (10, 2), generator=generator(3))
        for a, b in draws.tolist():
            product = int((here.elements == here.elements[a][here.elements[b]]).all(axis=1).argmax())
            images = here.images(one.matrices, [a, b, product])
            assert (images[0] @ images[1] - images[2]).abs().max() < tolerance
            assert abs(images[2].trace() - one.character[product]) < tolerance
        for commuting in one.commuting:
            assert (one.matrices @ commuting - commuting @ one.matrices).abs().max() < tolerance
        grams = torch.einsum("aij,bij->ab", one.commuting, one.commuting) / one.dim
        assert (grams - torch.eye(one.kind).double()).abs().max() < tolerance
    characters = torch.stack([one.character for one in found])
    products = characters @ characters.T / here.order
    assert (products - torch.diag(torch.tensor([float(one.kind) for one in found]).double())).abs().max() < tolerance


def test_a_mean_over_the_chain_is_the_mean_over_the_group():
    here = group("S4")
    a, b = (here.irreducibles[index].matrices for index in (3, 2))
    for left, right in ((a, a), (a, b)):
        drawn = torch.randn(left.shape[-1], right.shape[-1], generator=generator(), dtype=torch.float64)
        every = range(here.order)
        terms = here.images(left, every) @ drawn @ here.images(right, every).mT
        assert (here.mean(left, right, drawn) - terms.mean(0)).abs().max() < SYMMETRY[torch.float64]
        assert (terms[1] - terms.mean(0)).abs().max() > 0.1
    # By Schur's lemma nothing is left between two kinds.
    assert here.mean(a, b, drawn).abs().max() < SYMMETRY[torch.float64] < here.mean(a, a, a[0]).abs().max()


def test_a_large_group_has_an_order_and_no_list():
    large = FiniteGroup(np.array([one.array_form for one in SymmetricGroup(20).generators]))
    assert large.order == math.factorial(20)
    with pytest.raises(OrderError, match="at most 5000 elements can be listed, got one of about 10.18.4. Use"):
        large.elements  # noqa: B018  it is made when asked for
