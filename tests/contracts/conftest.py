"""What tests of contracts share with those of the model."""

from tests.model.conftest import quiet_library


__all__ = ["quiet_library"]
