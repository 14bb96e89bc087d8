"""Runs of an experiment in one file of JSON, so that it can be stopped at any time and no run is made twice."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.text.files import read_text

from ..common import VERSIONS, write_json


class RunRecords:
    """
    The runs of an experiment; the file is written again after each. One process at a time may add to it.

    Args:
        path (`Path`): The file; it need not exist.
        experiment (`str`): Its name.
        settings (`Mapping`): What all runs have in common, such as sizes and steps.

    Raises:
        ValueError: if the file is something else, or has runs with other settings.
    """

    def __init__(self, path: Path, experiment: str, settings: Mapping[str, Any]):
        self.path = path
        self.facts = {"experiment": experiment, "settings": json.loads(json.dumps(settings, default=str))}
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            self.runs = self._read()
        else:
            check_file(path, "output", force=False)

    def _read(self) -> list[dict[str, Any]]:
        try:
            content = json.loads(read_text(self.path, "output"))
            facts, runs = {name: content.pop(name) for name in self.facts}, content.pop("runs")
            if content or not all(isinstance(run, dict) for run in runs):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`output` must be a file of runs of this program, got {str(self.path)!r}. Name another."
            ) from error
        if facts != self.facts:
            raise ValueError(
                f"`output` must have runs with the same settings, got {str(self.path)!r} with {facts} instead of "
                f"{self.facts}. Name another file, or take its settings."
            )
        return runs

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The run with these values, if it is done."""
        return next((run for run in self.runs if all(run.get(name) == value for name, value in key.items())), None)

    def run(self, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The run with these values: what the file has of it, or what `make` gives, which is added to the file."""
        if (done := self.find(**key)) is not None:
            return done
        began = time.perf_counter()
        made = key | make()
        made |= {"seconds": round(time.perf_counter() - began, 1), "threads": torch.get_num_threads()} | VERSIONS
        self.runs.append(made)
        write_json(self.path, self.facts | {"runs": self.runs}, indent=1)
        return made

    def at_the_best_rate(
        self, make: Callable[[float, int], dict[str, Any]], rates: Sequence[float], loss: str, seeds: int, **key: Any
    ) -> list[dict[str, Any]]:
        """
        The runs of every seed at the rate whose run with seed 0 has the least loss.

        Args:
            make: One run, of a rate and a seed.
            rates: To choose from; a single one is taken as it is.
            loss: The key of the loss.
            seeds: How many.
            key: What else a run is known by.
        """
        first = [self.run(lambda rate=rate: make(rate, 0), rate=rate, seed=0, **key) for rate in rates]  # type: ignore[misc]
        best = min(first, key=lambda run: run[loss])
        rate = best["rate"]
        return [best, *(self.run(lambda s=s: make(rate, s), rate=rate, seed=s, **key) for s in range(1, seeds))]  # type: ignore[misc]
