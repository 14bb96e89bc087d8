"""Runs of an experiment in one file of JSON, so that it can be stopped at any time and no run is made twice."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn

from rigpt_hf.checkpoints.disk import check_writable
from rigpt_hf.checkpoints.folder import check_no_link, write_text
from rigpt_hf.checkpoints.written import json_sha256, look
from rigpt_hf.command_line import check_above
from rigpt_hf.terminal import Console
from rigpt_hf.text.files import read_text

from .common import VERSIONS, least


# The key under which a run keeps what it was when it was written.
DIGEST = "sha256"
# What a file says of all of its runs.
FACTS = ("experiment", "settings")


def read_runs(path: Path, argument: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    What a file of runs says of them all, and the runs.

    Args:
        path (`Path`): The file.
        argument (`str`): What an error calls it.

    Raises:
        ValueError: if no program wrote it so.
    """
    try:
        content = json.loads(read_text(path, argument))
        facts, runs = {name: content.pop(name) for name in FACTS}, content.pop("runs")
        if content or any(run.pop(DIGEST) != json_sha256(run) for run in runs):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`{argument}` must be a file of runs as this program wrote it, got {str(path)!r}. Name another."
        ) from error
    return facts, runs


class RunRecords:
    """
    The runs of an experiment; the file is written again after each. One process at a time may add to it.

    Args:
        path (`Path`): The file; it need not exist.
        experiment (`str`): Its name.
        settings (`Mapping`): What all runs have in common, such as sizes and steps.

    Raises:
        ValueError: if the file is something else or a link, or has runs with other settings.
    """

    def __init__(self, path: Path, experiment: str, settings: Mapping[str, Any]):
        self.path = path
        self.facts = dict(zip(FACTS, (experiment, json.loads(json.dumps(settings, default=str))), strict=True))
        self.runs: list[dict[str, Any]] = []
        self.seen = look(path)
        if self.seen is not None:
            check_no_link(path)
            self.runs = self._read()
        check_above(path, "output")

    def _read(self) -> list[dict[str, Any]]:
        facts, runs = read_runs(self.path, "output")
        if facts != self.facts:
            raise ValueError(
                f"`output` must have runs with the same settings, got {str(self.path)!r} with {facts} instead of "
                f"{self.facts}. Name another file, or take its settings."
            )
        return runs

    def done(self, **key: Any) -> list[dict[str, Any]]:
        """The runs with these values that are done."""
        return [run for run in self.runs if all(run.get(name) == value for name, value in key.items())]

    def best(self, loss: str, **key: Any) -> list[dict[str, Any]]:
        """The runs with these values, at that rate alone whose run with seed 0 has the least loss."""
        first = self.done(seed=0, **key)
        return self.done(rate=least(first, loss)["rate"], **key) if first else []

    def run(self, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The run with these values: what the file has of it, or what `make` gives, which is added to the file."""
        if done := self.done(**key):
            return done[0]
        check_writable(self.path, "output")
        began = time.perf_counter()
        made = key | make()
        facts = {"seconds": round(time.perf_counter() - began, 1), "threads": torch.get_num_threads()}
        made = json.loads(json.dumps(facts | VERSIONS | made))
        self.runs.append(made)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        signed = [run | {DIGEST: json_sha256(run)} for run in self.runs]
        text = json.dumps(self.facts | {"runs": signed}, indent=1) + "\n"
        self.seen = write_text(self.path, text, seen=self.seen)
        return made

    def chosen(self, rates: Sequence[float], loss: str, **key: Any) -> tuple[float, ...]:
        """The best of these rates, if runs with these values have tried them all; else all of them."""
        if {run["rate"] for run in self.done(seed=0, **key)} < set(rates):
            return tuple(rates)
        return (self.best(loss, **key)[0]["rate"],)

    def sweep(
        self,
        make: Callable[[float, int], dict[str, Any]],
        rates: Sequence[float],
        loss: str,
        seeds: int,
        *,
        further: int = 0,
        **key: Any,
    ) -> list[dict[str, Any]]:
        """
        A run with seed 0 at every rate, and runs with the other seeds at the best of them.

        Args:
            make: One run, of a rate and a seed.
            rates: To choose from, of several in rising order.
            loss: The key of the loss that chooses.
            seeds: How many.
            further: How many rates to try beyond these while the best is the lowest or the highest that was tried.
            key: What else a run is known by.

        Returns:
            The runs at the best rate.
        """
        for rate in rates:
            self.run(partial(make, rate, 0), rate=rate, seed=0, **key)
        rate = self.best(loss, **key)[0]["rate"]
        while len(rates) > 1:
            tried = sorted(run["rate"] for run in self.done(seed=0, **key))
            if rate not in (tried[0], tried[-1]) or len(tried) >= len(rates) + further:
                break
            beyond = float(f"{rate / 2 if rate == tried[0] else rate * 2:.3g}")
            self.run(partial(make, beyond, 0), rate=beyond, seed=0, **key)
            rate = self.best(loss, **key)[0]["rate"]
        return [self.run(partial(make, rate, seed), rate=rate, seed=seed, **key) for seed in range(seeds)]


@contextmanager
def shown_progress(steps: int, console: Console) -> Iterator[Callable[[str], Callable[[int, float], None]]]:
    """A bar of a run's steps; gives a function that makes of a run's name what its training calls after each step."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=steps)

        def tick(name: str, step: int, loss: float) -> None:
            progress.update(bar, completed=step, description=f"{name}, loss {loss:.3f}")

        yield lambda name: partial(tick, name)


def spread(values: Sequence[float]) -> str:
    """The mean, least and largest of several numbers, as a cell of a table."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"
