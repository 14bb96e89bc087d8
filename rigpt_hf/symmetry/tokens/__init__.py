"""
Symmetries of data: exchanges of tokens that a model holds as gauge transformations.

Reading order: `orders` (how large a group is), `group` (finite groups and their irreducible representations),
`symmetry` (which tokens are exchanged), `isotypic` (coordinates in which a group acts by irreducibles),
`representation` (how a model carries it), `measures`, `training`, `blocks` (a model that computes with them).
"""

from .blocks import in_blocks
from .group import FiniteGroup, Irreducible
from .measures import LearnedSymmetry, SymmetryError, learned_symmetry, symmetrize, symmetry_error
from .orders import OrderError
from .representation import Representation
from .symmetry import TokenSymmetry
from .training import SymmetricTraining, SymmetryCallback


__all__ = [
    "FiniteGroup",
    "Irreducible",
    "LearnedSymmetry",
    "OrderError",
    "Representation",
    "SymmetricTraining",
    "SymmetryCallback",
    "SymmetryError",
    "TokenSymmetry",
    "in_blocks",
    "learned_symmetry",
    "symmetrize",
    "symmetry_error",
]
