"""The options of `rigpt demo`; imports nothing heavy, as it is also its command line."""

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from ..checkpoints.source import is_free, is_model
from ..command_line import READS, WRITES


OF_ROTATION = ("model", "text", "megabytes", "prompt", "points")
PANEL = {"rich_help_panel": "Options of rigpt demo alone, not of rigpt demo symmetry"}


@dataclass
class DemoOptions:
    """The options of `rigpt demo`."""

    about: Annotated[Literal["rotation", "symmetry"], {"argument": True, "show_default": False}] = "rotation"
    """The demo: a model that is turned (if nothing is named), or three that learn from data with a symmetry."""
    output: Annotated[Path | None, WRITES, is_free, {"show_default": "runs/demo, or runs/demo-symmetry"}] = None
    """Folder for the report, and for the model that is turned."""
    model: Annotated[str | None, READS, is_model, PANEL] = None
    """Hub id or folder of a stock model to use instead of training one."""
    text: Annotated[Path | None, READS, PANEL] = None
    """A text file to train on instead of the documentation of the installed packages."""
    megabytes: Annotated[float, PANEL] = 20.0
    """How much documentation to gather at most."""
    steps: Annotated[int | None, {"show_default": "600, or 400 of each"}] = None
    """Training steps."""
    seed: int = 0
    """Seed of everything that is drawn: the order of the data, the training, the rotation, the sampled text."""
    prompt: Annotated[str | None, {"show_default": "depends on the model"}, PANEL] = None
    """Beginning of the text that the models continue."""
    points: Annotated[int, PANEL] = 9
    """Points on the way from the identity to the rotation."""
    force: bool = False
    """Replace an earlier demo in `output`."""

    def __post_init__(self):
        if self.about == "symmetry":
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name in OF_ROTATION and value != field.default:
                    raise ValueError(
                        f"`{field.name}` is an option of the demo `rotation`, got {str(value)!r} with `symmetry`. "
                        "Leave it out."
                    )
        if self.model is not None and self.text is not None:
            raise ValueError(
                "`text` is what a model is trained on, and `model` needs no training. Leave one of them out."
            )
        for name, value, least in (("steps", self.training_steps, 1), ("points", self.points, 2)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not 0 < self.megabytes < inf:
            raise ValueError(f"`megabytes` must be positive and finite, got {self.megabytes}.")

    @property
    def folder(self) -> Path:
        """`output`, or where a demo goes without."""
        return self.output or Path("runs/demo" if self.about == "rotation" else "runs/demo-symmetry")

    @property
    def training_steps(self) -> int:
        """`steps`, or how many a demo takes without."""
        return (600 if self.about == "rotation" else 400) if self.steps is None else self.steps
