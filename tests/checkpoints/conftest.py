import pytest

from rigpt_hf.checkpoints import disk


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request, monkeypatch):
    """Once with the system call that exchanges names, and once as on systems without it."""
    if request.param == "two renames":
        monkeypatch.setattr(disk, "RENAME_EXCHANGE", 2**20)
