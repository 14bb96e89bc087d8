"""The command line in the process of the tests, as in `tests/cli`."""

from tests.cli.conftest import rigpt


__all__ = ["rigpt"]
