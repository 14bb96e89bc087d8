"""Windows of text, and the losses on them."""

import pytest
import torch

from rigpt_hf.quantization import calibration_tokens, window_losses
from rigpt_hf.quantization.calibration import windows

from ..models import tiny_model, tokens


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **options: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 61 for letter in text]])}


def test_windows_of_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat " * 40)
    found = calibration_tokens(Letters(), path, tokens=100, context=16)
    assert found.shape == (6, 16) and torch.equal(found.flatten(), Letters()(path.read_text())["input_ids"][0, :96])
    assert calibration_tokens(Letters(), path, tokens=10**6, context=16).shape == (40 * 23 // 16, 16)


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`calibration` must hold at least one window of 16 tokens, got 9 in a file"):
        windows(Letters(), ["the", "cat."], 100, 16, "a file")
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match="`source` must hold some text"):
        calibration_tokens(Letters(), tmp_path / "blank.txt")


def test_losses_of_windows_are_those_of_the_model():
    model, rows = tiny_model(), tokens(3, 8)
    found = window_losses(model, rows)
    assert len(found) == 3 and len(set(found)) == 3
    with torch.no_grad():
        assert abs(sum(found) / 3 - float(model(input_ids=rows, labels=rows).loss)) < 1e-12
