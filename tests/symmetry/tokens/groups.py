"""Symmetries of the tiny models' 61 tokens, of every kind of irreducible representation."""

import numpy as np
from sympy.combinatorics import Permutation, PermutationGroup
from sympy.combinatorics.named_groups import AlternatingGroup, DihedralGroup, SymmetricGroup

from rigpt_hf.symmetry.tokens import TokenSymmetry


VOCABULARY = 61


def table(group: PermutationGroup) -> np.ndarray:
    """`table[a][b]` is the number of `a b`, which does `b` first."""
    elements = list(group.generate())
    numbers = {tuple(element.array_form): index for index, element in enumerate(elements)}
    return np.array([[numbers[tuple((b * a).array_form)] for b in elements] for a in elements])


def quaternions() -> PermutationGroup:
    return PermutationGroup([Permutation([1, 2, 3, 0, 5, 6, 7, 4]), Permutation([4, 7, 6, 5, 2, 1, 0, 3])])


def of(group: PermutationGroup, first: int = 5) -> TokenSymmetry:
    """The group on tokens from `first` on."""
    cycles = [[[first + point for point in cycle] for cycle in one.cyclic_form] for one in group.generators]
    return TokenSymmetry(VOCABULARY, cycles)


SYMMETRIES = {
    "cyclic": lambda: TokenSymmetry.named("cyclic", [range(5, 10), range(20, 25)], VOCABULARY),
    "symmetric": lambda: TokenSymmetry.named("symmetric", [range(5, 8), range(20, 23)], VOCABULARY),
    "quaternions": lambda: of(quaternions()),
    "conjugations": lambda: TokenSymmetry.of_table(
        "conjugations", table(AlternatingGroup(4)), range(10, 22), VOCABULARY
    ),
    "two": lambda: (
        TokenSymmetry.named("cyclic", [[5, 6]], VOCABULARY)
        | TokenSymmetry.named("dihedral", [range(30, 35)], VOCABULARY)
    ),
}
GROUPS = {"A5": AlternatingGroup(5), "D5": DihedralGroup(5), "S4": SymmetricGroup(4), "Q8": quaternions()}
