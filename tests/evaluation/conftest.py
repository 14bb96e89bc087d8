"""Where the `evaluate` library keeps what it loads."""

from collections.abc import Iterator

import evaluate
import pytest


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
