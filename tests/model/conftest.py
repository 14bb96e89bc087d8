"""What tests of the model share."""

import logging

import pytest


@pytest.fixture
def quiet_library():
    """The library calls an assistant in a way that it calls deprecated itself."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
