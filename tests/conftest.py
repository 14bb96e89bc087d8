"""Fixtures for all tests, and the rule that deprecated use of an upstream library fails."""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests import processes


if TYPE_CHECKING:
    from tests.models import Pair


# Before any library reads them: tests need no network, say nothing to anyone, and run one per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        processes.begin()


def pytest_xdist_auto_num_workers(config) -> int:
    """One more than there are cores, as some tests wait for processes that they start."""
    return (psutil.cpu_count(logical=False) or 1) + 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """
    Mark all variants of a test but n, at equal distances, `full` where it is marked `by_default(n)`; and begin with
    files that hold a slow one, so that nobody waits for them in the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    variants: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("by_default") and not item.get_closest_marker("full"):
            variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in variants.values():
        count = several[0].get_closest_marker("by_default").args[0]
        kept = {index * len(several) // count for index in range(count)}
        for index, item in enumerate(several):
            if index not in kept:
                item.add_marker("full")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item):
    """Numbers of later tests must not depend on a test that leaves another dtype of torch behind."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_default_dtype() != torch.float32:
        torch.set_default_dtype(torch.float32)
        pytest.fail(f"{item.nodeid} left another default dtype of torch behind")


def pytest_collection_finish(session):
    # Libraries are a million objects that stay, and looking at them again and again a tenth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        processes.end()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data folder {SHARED_DATA.parent.name}/{SHARED_DATA.name} beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def _pairs() -> dict:
    return {}


@pytest.fixture(scope="module")
def turned(_pairs: dict) -> Iterator[Callable[..., "Pair"]]:
    """
    `turned(option, dtype)`: the model of an option set, an equal one turned in every frame, and the transformation.

    Made once for all tests of a process, which must leave both models as they are.
    """
    yield from shared(_pairs)


def shared(pairs: dict) -> Iterator[Callable[..., "Pair"]]:
    """Once: the function that makes pairs, or finds them in `pairs`; then an error if those it gave have changed."""
    from tests.models import contents, turned_pair

    used = set()

    def get(option: str, *dtype) -> "Pair":
        key = (option, *dtype)
        if key not in pairs:
            pair = turned_pair(*key)
            pairs[key] = pair, [contents(pair.model), contents(pair.turned)]
        used.add(key)
        return pairs[key][0]

    yield get
    changed = [key for key in used if [contents(model) for model in pairs[key][0][:2]] != pairs[key][1]]
    for key in changed:
        del pairs[key]
    assert not changed, f"a test of this module changed models that all tests share: {changed}"


class _Deprecations(logging.Handler):
    """Keeps what Transformers logs about deprecated use; it logs where others warn."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord):
        if "deprecat" in record.getMessage().lower():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def deprecations_in_logs_fail():
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, f"deprecated use of Transformers: {handler.messages}"
