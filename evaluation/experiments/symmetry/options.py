"""The options that all experiments on symmetries of data share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rigpt_hf.command_line import WRITES
from rigpt_hf.demo.learners import Learner, Sizes

from ..common import check_heads, check_known, check_least, check_rates


# The shared options that decide the numbers of a run.
DECISIVE = ("steps", "batch", "hidden_size", "layers", "heads")


@dataclass(frozen=True)
class LearnerOptions:
    """
    The learners, their shape and training, and where their runs go. An experiment inherits these options, with
    defaults of its own, and names its `KNOWN` learners and those of its own options that are `DECISIVE` too.
    """

    seeds: int = 3
    """Seeds at the best rate; the sweep is done with the first."""
    steps: int = 600
    """Steps of training."""
    batch: int = 64
    """Rows per step."""
    hidden_size: int = 64
    """Stream size."""
    layers: int = 3
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    rates: Annotated[list[float], {"show_default": "each its own"}] = field(default_factory=list)
    """Learning rates to sweep, separated by commas."""
    output: Annotated[Path, WRITES] = Path("runs/symmetry.json")
    """File of all runs; those that it has are not made again."""
    picture: Annotated[Path | None, WRITES] = None
    """File of a picture of them all: PNG, SVG or PDF."""
    only: str = ""

    KNOWN: ClassVar[Mapping[str, Learner]] = {}
    DECISIVE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_known("only", self.learners, self.KNOWN)
        check_least(self, seeds=1, steps=1, batch=1)
        check_heads(self)
        check_rates(self.rates)

    @property
    def learners(self) -> list[str]:
        """The names of the learners."""
        return [name.strip() for name in self.only.split(";")]

    def rates_of(self, learner: str) -> Sequence[float]:
        """The learning rates that are swept for a learner."""
        return self.rates or self.KNOWN[learner].rates

    @property
    def settings(self) -> dict[str, Any]:
        """The values that all runs of a file have in common."""
        return {name: getattr(self, name) for name in (*DECISIVE, *self.DECISIVE)}

    def sizes(self, positions: int) -> Sizes:
        """The shape of a learner whose longest row has so many tokens."""
        return Sizes(self.hidden_size, self.layers, self.heads, positions)
