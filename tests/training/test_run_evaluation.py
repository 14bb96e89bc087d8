"""How a run judges itself: as many windows at once as in training, and what was judged is what is kept."""

import statistics

import pytest
import torch
from safetensors.torch import load_file

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.training import loop
from rigpt_hf.training.checkpoints import CheckpointStore
from rigpt_hf.training.diagnostics import in_parts, stream_kurtosis, summed_loss
from rigpt_hf.training.sharding import restore_weights_
from rigpt_hf.training.state import load_state
from tests.tolerances import DISTRIBUTED
from tests.training.runs import CALM, losses_of, make_options, pretrain


@pytest.fixture
def rows(monkeypatch):
    """Windows of every evaluation's passes through the model, one by one."""
    seen = []
    forward = RiGPTForCausalLM.forward

    def watched(self, *args, **kwargs):
        if not self.training:
            seen.append(len(args[0] if args else kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(RiGPTForCausalLM, "forward", watched)
    return seen


def prepared(data, output, **options) -> loop.PretrainingRun:
    return loop.PretrainingRun(make_options(data, output, **CALM, global_batch_size=8, **options), progress=False)


def test_evaluation_takes_no_more_windows_at_once_than_training(data, tmp_path, rows):
    whole = prepared(data, tmp_path)
    loss, kurtosis = whole._validate(), whole._diagnose()["kurtosis"]
    assert rows == [8, 8, 8, 1, 1], "two batches, the first of them once more, and a window in two frames"
    rows.clear()
    parts = prepared(data, tmp_path, per_device_train_batch_size=3)
    assert abs(parts._validate() - loss) <= DISTRIBUTED
    assert rows == [3, 3, 2] * 2
    found = parts._diagnose()["kurtosis"]
    assert rows == [3, 3, 2] * 3 + [1, 1]
    assert len(found) == 3 and max(abs(a - b) for a, b in zip(found, kurtosis, strict=True)) <= DISTRIBUTED
    # Parts of unequal size count by their tokens: means of means are something else.
    batches = [part for batch in whole.validation for part in in_parts(batch, 3)]
    each = [torch.div(*summed_loss(whole.model, [batch])) for batch in batches]
    assert abs(statistics.mean(map(float, each)) - loss) > 10 * DISTRIBUTED
    of_parts = [stream_kurtosis(whole.model, part)[-1] for part in in_parts(whole.validation[0], 3)]
    assert abs(statistics.mean(of_parts) - kurtosis[-1]) > 10 * DISTRIBUTED


def test_a_run_with_small_parts_evaluates_in_small_parts_and_has_the_same_losses(data, plain, tmp_path, rows):
    pretrain(data, tmp_path, **CALM, per_device_train_batch_size=3)
    assert len(rows) == 4 * 2 * 2 + 2 + 2 and set(rows) == {1, 3}, "four validations, kurtosis, two frames"
    for a, b in zip(losses_of(plain), losses_of(tmp_path), strict=True):
        assert abs(a - b) <= DISTRIBUTED


def test_the_best_checkpoint_is_the_model_that_was_judged(data, tmp_path):
    pretrain(data, tmp_path / "run", **CALM, global_batch_size=8, max_steps=6, ema_decay=0.8)
    best = CheckpointStore(tmp_path / "run" / "checkpoints").best()
    judge = prepared(data, tmp_path / "judge")
    weights = load_file(best.path / "model" / "model.safetensors")
    restore_weights_(judge.model, weights)
    assert judge._validate() == best.metric
    saved = load_state(best.path / "optimizer.pt")["optimizer"]
    restore_weights_(judge.model, weights | {name: entry["average"] for name, entry in saved.items()})
    assert abs(judge._validate() - best.metric) > 100 * DISTRIBUTED, "the weights of training were not judged"


def test_only_what_may_be_kept_as_the_best_is_judged_besides(data, tmp_path):
    short = {"max_steps": 4, "warmup_steps": 1, "eval_steps": 3}
    none = pretrain(data, tmp_path / "none", **short, save_steps=2, save_best_limit=0)
    assert [step for step, _ in none.validation] == [3, 4]
    best = pretrain(data, tmp_path / "best", **short, save_steps=2, save_total_limit=1)
    assert [step for step, _ in best.validation] == [2, 3, 4]
    assert all(one.metric is not None for one in CheckpointStore(tmp_path / "best" / "checkpoints").checkpoints())
