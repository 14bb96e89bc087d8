"""The ways to run that others only promise: launched, tracked, in bfloat16, compiled, and with one process killed."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tolerances import DISTRIBUTED
from tests.training.runs import CALM, launch, losses_of, numbers_of, pretrain, same_run


@pytest.fixture
def another_precision():
    """Accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def apart(a: Path, b: Path) -> float:
    return max(abs(x - y) for x, y in zip(losses_of(a), losses_of(b), strict=True))


def test_the_default_tracker_writes_the_log(plain, straight):
    (event_file,) = plain.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(event_file.parent))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in written] == list(range(1, 13))
    assert [value for _, value in written] == pytest.approx(losses_of(plain), rel=1e-6)
    assert [event.step for event in events.Scalars("validation_loss")] == [3, 6, 9, 12]
    assert not list(straight.rglob("events.out.*"))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(data, plain, tmp_path, another_precision, monkeypatch):
    seen = set()
    linear = torch.nn.functional.linear

    def watched(*arguments):
        result = linear(*arguments)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    report = pretrain(data, tmp_path, **CALM, mixed_precision="bf16")
    assert torch.bfloat16 in seen
    assert 10 * DISTRIBUTED < apart(tmp_path, plain) < 0.1
    assert report.losses[-1] < report.losses[0] - 0.4
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}
    seen.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(data, tmp_path / "none", **CALM, max_steps=2, warmup_steps=1)
    assert seen - {torch.float64} == {torch.float32}


@pytest.mark.full
def test_a_compiled_run_gives_the_same_curve(data, tmp_path, monkeypatch):
    graphs, compiled = [], torch.compile
    small = CALM["config_overrides"] | {"num_hidden_layers": 1, "value_embedding_period": None}
    short = {"config_overrides": small, "max_steps": 2, "warmup_steps": 1}

    def watched(model):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        # Kernels are compiled by a C++ compiler for longer than a test may take; the graphs are the same.
        return compiled(model, backend=backend)

    monkeypatch.setattr(torch, "compile", watched)
    pretrain(data, tmp_path / "no", **short)
    assert graphs == []
    pretrain(data, tmp_path / "yes", **short, torch_compile=True)
    assert graphs and apart(tmp_path / "yes", tmp_path / "no") <= DISTRIBUTED


@pytest.mark.slow
def test_one_of_two_processes_killed(data, tmp_path):
    """The other one ends by itself, and the same command goes on as if nothing had happened."""
    options = {"max_steps": 14, "save_steps": 1, "save_best_limit": 0}
    launch(data, tmp_path / "straight", 2, **options)
    (killed,) = launch(data, tmp_path / "killed", 2, kills=1, victims=[1], **options)["killed_at"]
    assert 0 < killed < 14
    assert numbers_of(tmp_path / "killed") == numbers_of(tmp_path / "straight")
    assert same_run(tmp_path / "killed", tmp_path / "straight")
