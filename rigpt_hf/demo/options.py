"""The options of `rigpt demo`; imports nothing heavy, as it is also its command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..checkpoints.source import is_free, is_model
from ..command_line import READS, WRITES


@dataclass
class DemoOptions:
    """The options of `rigpt demo`."""

    output: Annotated[Path, WRITES, is_free] = Path("runs/demo")
    """Folder for the model and the report."""
    model: Annotated[str | None, READS, is_model] = None
    """Hub id or folder of a stock model to use instead of training one."""
    text: Annotated[Path | None, READS] = None
    """A text file to train on instead of the documentation of the installed packages."""
    megabytes: float = 20.0
    """How much documentation to gather at most."""
    steps: int = 800
    """Training steps."""
    seed: int = 0
    """Of everything that is drawn: the order of the text, the training, the rotation, the sampled text."""
    prompt: Annotated[str | None, {"show_default": "depends on the model"}] = None
    """What the models continue."""
    points: int = 9
    """Points on the way from the identity to the rotation."""
    force: bool = False
    """Replace an earlier demo in `output`."""

    def __post_init__(self):
        if self.model is not None and self.text is not None:
            raise ValueError(
                "`text` is what a model is trained on, and `model` needs no training. Leave one of them out."
            )
        for name, least in (("steps", 1), ("points", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.megabytes <= 0:
            raise ValueError(f"`megabytes` must be positive, got {self.megabytes}.")
