"""The moving average of weights: the formula, in place and out again, and through checkpoints."""

import pytest
import torch
from safetensors.torch import load_file

from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.training import saving
from rigpt_hf.training.averaging import WeightAverage
from rigpt_hf.training.state import load_state
from tests.models import tiny_model, tokens
from tests.tolerances import TRAINING
from tests.training.runs import interrupted, log_of, losses_of, pretrain, same_run, weights_of


def trained(model, adamw: bool = False):
    """The average of a model after a few steps, and its weights along the way."""
    if adamw:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    else:
        optimizer = EquivariantOptimizer(equivariant_param_groups(model, lr=3e-3))
    average, path = WeightAverage(model, optimizer, 0.9), []
    for step in range(6):
        ids = tokens(4, 17, seed=step)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(step + 1)
        path.append([parameter.detach().clone() for parameter in model.parameters()])
    return average, path


@pytest.mark.parametrize("adamw", [False, True], ids=["equivariant", "adamw"])
def test_the_average_is_that_of_the_path_and_weights_come_back_whatever_happens_inside(adamw):
    model = tiny_model()
    average, path = trained(model, adamw)
    expected = path[0]
    for step, weights in enumerate(path[1:], 2):
        kept = min(0.9, step / (step + 9))
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, weights, strict=True)]
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        for parameter, value, last in zip(model.parameters(), expected, path[-1], strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)
            assert (parameter - last).abs().max() > 1e-5
        raise RuntimeError("inside")
    assert all(torch.equal(p, last) for p, last in zip(model.parameters(), path[-1], strict=True))
    with WeightAverage(model, average.optimizer, None).applied():
        assert all(torch.equal(p, last) for p, last in zip(model.parameters(), path[-1], strict=True))


def test_the_average_turns_along():
    model = tiny_model(embedding_size=24)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(3), "all", compact=True)
    turned = g(model)
    averages = [trained(each.train())[0] for each in (model, turned)]
    with averages[0].applied(), averages[1].applied():
        for a, b in zip(g(model).parameters(), turned.parameters(), strict=True):
            assert (a - b).abs().max() <= TRAINING


@pytest.mark.full
def test_a_resumed_run_goes_on_from_the_weights_and_their_average(data, straight, tmp_path, monkeypatch):
    averaged = tmp_path / "averaged"
    report = pretrain(data, averaged, ema_decay=0.8)
    again = pretrain(data, interrupted(averaged, tmp_path / "resumed"), ema_decay=0.8)
    assert again.started == 9 and again.validation[-1] == report.validation[-1]
    assert same_run(averaged, tmp_path / "resumed")
    with monkeypatch.context() as patched:
        patched.setattr(saving, "exchange_saved", lambda weights, state: None)
        pretrain(data, interrupted(averaged, tmp_path / "mistaken"), ema_decay=0.8)
    mistaken, right = losses_of(tmp_path / "mistaken"), losses_of(averaged)
    assert mistaken[:9] == right[:9] and mistaken[9] != right[9], "it went on from the average"
    # What is validated is the model of every checkpoint; the weights of training lie beside the moments.
    last = averaged / "checkpoints" / "step-00000012"
    assert weights_of(averaged) == weights_of(last)
    saved, model = load_state(last / "optimizer.pt")["optimizer"], load_file(last / "model" / "model.safetensors")
    assert len(saved) > 10 and all(not torch.equal(saved[name]["average"], model[name]) for name in saved)
    assert right == losses_of(straight) and weights_of(averaged) != weights_of(straight)
    assert report.validation[-1][1] != log_of(straight)[-1]["validation_loss"]
