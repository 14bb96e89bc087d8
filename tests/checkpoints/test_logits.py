"""The bar of a pass through a model."""

import torch
from tqdm import tqdm

from rigpt_hf.checkpoints import logits
from tests.models import tiny_model, tokens


def test_layers_are_counted_while_they_run(monkeypatch):
    monkeypatch.setattr(logits, "tqdm", lambda **settings: tqdm(**settings | {"disable": False}))
    model = tiny_model()
    plain = logits.record_logits(model, tokens(2, 9))
    with logits.layers_counted(model) as bar, torch.no_grad():
        assert bar.total == model.config.num_hidden_layers > 1 and bar.n == 0
        model(tokens(2, 9))
        assert bar.n == bar.total
    model(tokens(2, 9))
    assert bar.n == bar.total, "the hooks are gone"
    monkeypatch.setattr(logits, "layers_counted", lambda model: torch.no_grad())
    assert torch.equal(plain.logits, logits.record_logits(model, tokens(2, 9)).logits)
