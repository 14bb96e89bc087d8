"""The card that `push_to_hub` sends beside the weights, without a Hub: the files to upload are looked at instead."""

import inspect
import logging
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.model_cards import card as cards
from rigpt_hf.model_cards import pushed
from rigpt_hf.model_cards.card import card_text
from rigpt_hf.model_cards.marker import is_unchanged, read_marker
from rigpt_hf.model_cards.pushed import SAYS_NOTHING, write_card_of_push
from tests.models import tiny_model


# As `create_and_tag_model_card` of Transformers writes it.
STOCK = f"---\nlibrary_name: transformers\ntags:\n- mine\n---\n\n# Model Card\n\n{SAYS_NOTHING}\n"


@pytest.fixture
def folder(tmp_path, known_invariance) -> Path:
    tiny_model(0, dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """The cards that Transformers is asked to upload."""
    cards: list[str] = []

    def upload(self, working_dir, repo_id, **options):
        cards.append((Path(working_dir) / "README.md").read_text())

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    return cards


def test_it_is_called_as_that_of_every_model():
    assert inspect.signature(RiGPTForCausalLM.push_to_hub) == inspect.signature(PreTrainedModel.push_to_hub)
    assert "rigpt publish" in RiGPTForCausalLM.push_to_hub.__doc__
    assert "_upload_modified_files" in inspect.getsource(PreTrainedModel.push_to_hub), "or the card would not go along"


def test_the_card_of_a_rigpt_arrives(folder, sent):
    model = RiGPTForCausalLM.from_pretrained(folder)
    (folder / "README.md").write_text(STOCK)
    model._upload_modified_files(folder, "me/tiny", files_timestamps={})
    (text,) = sent
    assert SAYS_NOTHING not in text and 'from_pretrained("me/tiny"' in text and "how it was trained" in text
    assert text == card_text(folder, repo_id="me/tiny", tags=["mine"]) and "mine" in ModelCard(text).data.tags
    assert is_unchanged(text, read_marker(text))


def test_a_card_of_our_making_follows_the_weights(folder):
    card = folder / "README.md"
    card.write_text(STOCK)
    write_card_of_push(folder, "me/tiny")
    first = card.read_text()
    tiny_model(1, dtype=torch.float32).save_pretrained(folder)
    card.write_text(str(ModelCard(first)))  # as it comes back from the Hub
    write_card_of_push(folder, "me/tiny")
    assert read_marker(card.read_text()).weights != read_marker(first).weights
    assert ModelCard(card.read_text()).data.tags == ModelCard(first).data.tags
    # What people wrote or changed stays.
    for text in ("# Mine\n", first.replace("## Limits", "## Bounds")):
        card.write_text(text)
        write_card_of_push(folder, "me/tiny")
        assert card.read_text() == text


def test_the_weights_go_whatever_happens_to_the_card(folder, sent, monkeypatch):
    for error in (
        RuntimeError("can't allocate memory:\nyou tried to allocate 56 GB"),
        MemoryError(),
        ZeroDivisionError("x"),
    ):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(cards, "invariance_of", fail)
        lines: list[str] = []
        monkeypatch.setattr(pushed.logger, "warning", lines.append)
        (folder / "README.md").write_text(STOCK)
        RiGPTForCausalLM.from_pretrained(folder)._upload_modified_files(folder, "me/tiny", files_timestamps={})
        assert sent.pop() == STOCK and not sent
        (line,) = lines
        assert "\n" not in line and line.endswith(" ".join(str(error).split()) or type(error).__name__)


def test_a_push_can_still_be_stopped(folder, sent, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cards, "invariance_of", interrupt)
    (folder / "README.md").write_text(STOCK)
    with pytest.raises(KeyboardInterrupt):
        RiGPTForCausalLM.from_pretrained(folder)._upload_modified_files(folder, "me/tiny", files_timestamps={})
    assert sent == []


def test_without_the_package_or_a_card_the_weights_still_go(folder, sent, monkeypatch):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    for name in ("rigpt_hf.hub_rigpt", "rigpt_hf.model_cards.pushed"):
        logging.getLogger(name).addHandler(handler)
    model = RiGPTForCausalLM.from_pretrained(folder)
    (folder / "README.md").write_text(STOCK)
    (folder / "certificate.json").write_text("{}")
    model._upload_modified_files(folder, "me/tiny", files_timestamps={})
    monkeypatch.setitem(sys.modules, "rigpt_hf.model_cards.pushed", None)
    model._upload_modified_files(folder, "me/tiny", files_timestamps={})
    for name in ("rigpt_hf.hub_rigpt", "rigpt_hf.model_cards.pushed"):
        logging.getLogger(name).removeHandler(handler)
    assert sent == [STOCK, STOCK]
    assert "certificate that can be read" in lines[0] and "install rigpt-hf" in lines[1] and len(lines) == 2
