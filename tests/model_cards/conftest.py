"""Cards without the seconds that an invariance error takes to measure."""

import pytest

from rigpt_hf.model_cards import card as cards
from tests.model_cards.test_card import INVARIANCE


@pytest.fixture
def known_invariance(monkeypatch) -> None:
    """The invariance error of every model is from a table."""
    monkeypatch.setattr(cards, "invariance_of", lambda *arguments: INVARIANCE | {"random_tokens": True})
