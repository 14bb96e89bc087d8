"""Commands of SCAN to train on and to ask for, as rows of token ids."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .learners import Parts, answers
from .scan import Example, encode, split


# Commands that are shown in a tenth of the rows, as they are all that a split says of a word.
SHOWN_OFTEN = {"add-jump": ("jump",), "add-turn-left": ("turn", "left")}
SHARE_SHOWN_OFTEN, KEPT_BACK = 0.1, 0.05
# Rows of similar length that go through a model at once.
ROWS, ROWS_ASKED = 16, 256


class Commands:
    """
    The commands of a split: those to train on, those of them that are kept back, and those of the test.

    Args:
        name, longest: As of [`split`].
    """

    def __init__(self, name: str, longest: int | None = None):
        trained, self.test = split(name, longest)
        often = SHOWN_OFTEN.get(name)
        self.often = [one for one in trained if one.command == often]
        back = np.random.default_rng(0).random(len(trained)) < KEPT_BACK
        back &= np.array([one.command != often for one in trained])
        self.kept_back = [one for one, out in zip(trained, back, strict=True) if out]
        self.trained = [one for one, out in zip(trained, back, strict=True) if not out]
        if not (self.trained and self.kept_back and self.test):
            raise ValueError(
                f"`longest` must leave commands to train on, to keep back and to test, got {longest} with the split "
                f"{name!r}. Allow longer answers, or take another split."
            )
        self.rows = to_tensors(self.trained + self.often)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, of those of the test too."""
        return max(len(one.command) + len(one.actions) + 3 for one in self.test + self.trained)

    @property
    def asked(self) -> torch.Tensor:
        """Token ids of the commands that were kept back, with their answers, `[commands, length]`."""
        return to_tensors(self.kept_back)[0]

    def sample(self, count: int) -> list[Example]:
        """Some commands of the test, evenly spaced."""
        return self.test[:: max(1, len(self.test) // count)][:count]

    def batches(self, size: int, seed: int) -> "Batches":
        """Rows of so many commands for each step, drawn by a seed."""
        return Batches(self, size, seed)


class Batches:
    """Rows of each step, as parts of similar length; see [`Commands.batches`]."""

    def __init__(self, commands: Commands, size: int, seed: int):
        self.ids, self.labels = commands.rows
        self.often, self.plain = len(commands.often), len(commands.trained)
        self.size, self.draw = size, np.random.default_rng(seed)

    def __call__(self, step: int) -> Parts:
        chosen = self.draw.integers(self.plain, size=self.size)
        if self.often:
            shown = round(SHARE_SHOWN_OFTEN * self.size)
            chosen[:shown] = self.plain + self.draw.integers(self.often, size=shown)
        return list(in_parts(self.ids[chosen], self.labels[chosen], ROWS))


def to_tensors(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """[`encode`] as tensors."""
    ids, labels = encode(examples)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def in_parts(ids: torch.Tensor, labels: torch.Tensor, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in the order of their lengths, in parts without needless padding."""
    lengths = ids.shape[1] - (labels.flip(1) >= 0).int().argmax(1)  # the end of an answer is its row's
    for part in lengths.argsort(stable=True).split(rows):
        end = int(lengths[part].max())
        yield ids[part, :end], labels[part, :end]


def share_right(model: Any, examples: list[Example]) -> tuple[float, float]:
    """The loss on the answers, nats per token, and the share of commands that the model answers right."""
    loss, right = answers(model, in_parts(*to_tensors(examples), ROWS_ASKED))
    return loss, float(right.mean())
