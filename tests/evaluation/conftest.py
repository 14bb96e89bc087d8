"""Where the `evaluate` library keeps what it loads, and a small evaluation that several files look at."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

from rigpt_hf.conversion import convert_model
from rigpt_hf.evaluation.harness import statistics
from tests.evaluation.small import BRIEF, SUITE, run, save
from tests.evaluation.toys import tiny_gpt2


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory) -> Iterator[None]:
    """
    Nothing may be asked of the network, and nothing may be left in the home of whoever runs the tests.

    One folder for the session: Python remembers where a package's modules were first found.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_exchanges() -> Iterator[None]:
    """A tenth of the random exchanges of a paired test: enough for the few differences of a small evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "EXCHANGES", statistics.EXCHANGES // 10)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Three models with a tokenizer, a row of tokens and a suite; nobody writes here."""
    folder = tmp_path_factory.mktemp("world")
    gpt2 = tiny_gpt2()
    for name, model in (("gpt2", gpt2), ("rigpt", convert_model(gpt2)), ("other", tiny_gpt2(seed=1))):
        save(folder / name, model)
    np.random.default_rng(0).integers(0, 61, 1000).astype("<u2").tofile(folder / "tokens.bin")
    for name, suite in (("suite", SUITE), ("brief", BRIEF)):
        (folder / f"{name}.yaml").write_text(suite.format(source=folder / "tokens.bin"))
    return folder


@pytest.fixture(scope="session")
def evaluation(world, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The output folder and the results of a whole run of a GPT-2's conversion against it."""
    output = tmp_path_factory.mktemp("out") / "evaluation"
    return output, run(world, output, against="gpt2")
