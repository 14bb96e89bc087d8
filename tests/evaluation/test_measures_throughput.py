"""Speed and memory: closed forms on a clock that only models move, and what a failure may cost."""

import json
import statistics
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from rigpt_hf.evaluation import timing
from rigpt_hf.evaluation.measures import throughput as module
from rigpt_hf.evaluation.measures.throughput import ERROR, own_bytes, reason, throughput
from rigpt_hf.evaluation.models import evaluated
from tests.evaluation.toys import tiny_gpt2


PROMPT, NEW, ROWS, TURNS = 8, 4, 2, 3
# Seconds that the first call of a model takes more than all others.
COLD = 1000.0


class Clock:
    """Time, which passes only where a model says so."""

    def __init__(self):
        self.now = 0.0
        self.calls: list[tuple[str, str]] = []


class Timed(nn.Module):
    """A model whose passes take known times: so many seconds for a token of the prompt, for a step, and to start."""

    def __init__(self, clock: Clock, name: str, token: float, step: float, start: float):
        super().__init__()
        self.clock, self.name, self.token, self.step, self.start = clock, name, token, step, start
        self.config = SimpleNamespace(vocab_size=7, max_position_embeddings=64)
        self.cold = True

    def spend(self, seconds: float, what: str):
        self.clock.now += seconds + (COLD if self.cold else 0.0)
        self.clock.calls.append((self.name, what))
        self.cold = False

    def forward(self, input_ids, past_key_values=None, **options):
        # A pass over one row takes as long as over several.
        length = input_ids.shape[1]
        self.spend(*((self.step, "step") if past_key_values else (self.token * length, "prompt")))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7), past_key_values=["cache"])

    def generate(self, input_ids, max_new_tokens, **options):
        assert max_new_tokens == 1
        self.spend(self.start, "generate")


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "timer", lambda: clock.now)
    return clock


def measured(clock: Clock, **options):
    models = {
        "quick": Timed(clock, "quick", token=0.25, step=1.0, start=2.0),
        "slow": Timed(clock, "slow", token=0.5, step=3.0, start=8.0),
    }
    arguments = {"prompt": PROMPT, "new_tokens": NEW, "batch_size": ROWS, "turns": TURNS, "memory": False}
    return throughput(models, **(arguments | options))


def test_speeds_in_closed_form(clock):
    ticks = []
    found = measured(clock, progress=ticks.append)
    assert len(ticks) == 3 * (TURNS + 1)
    tokens = ROWS * PROMPT
    expected = {
        "quick": (tokens / (0.25 * PROMPT), ROWS / 1.0, 2.0),
        "slow": (tokens / (0.5 * PROMPT), ROWS / 3.0, 8.0),
    }
    for name, values in expected.items():
        each = found["models"][name]
        keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token")
        for key, value in zip(keys, values, strict=True):
            # No turn is unlike another, as the first, cold one does not count.
            assert each[key] == pytest.approx({"median": value, "lower": value, "upper": value}, rel=1e-12), key
    assert clock.now > 2 * COLD


def test_a_ratio_above_one_is_faster(clock):
    ratios = measured(clock)["ratios"]
    assert list(ratios) == ["quick"]
    expected = {"prefill_tokens_per_second": 2.0, "decode_tokens_per_second": 3.0, "time_to_first_token": 4.0}
    for key, value in expected.items():
        assert ratios["quick"][key]["median"] == pytest.approx(value, rel=1e-12)
        assert ratios["quick"][key]["values"] == pytest.approx([value] * TURNS, rel=1e-12)


def test_models_take_turns_and_change_who_is_first(clock):
    measured(clock)
    rounds = [["slow", "quick"] if turn % 2 == 0 else ["quick", "slow"] for turn in range(TURNS + 1)]
    expected = [
        (name, what)
        for work in (["prompt"], ["prompt", *["step"] * NEW], ["generate"])
        for names in rounds
        for name in names
        for what in work
    ]
    assert clock.calls == expected
    assert rounds[1] != rounds[2], "somebody else must be first in the next turn"


def test_spread_is_over_turns(clock):
    """A model that gets slower with every call: each turn counts as it was."""

    class Tiring(Timed):
        def spend(self, seconds, what):
            super().spend(seconds, what)
            self.token *= 2

    found = throughput(
        {"tiring": Tiring(clock, "tiring", 0.25, 1.0, 2.0)}, prompt=PROMPT, new_tokens=NEW, turns=TURNS, memory=False
    )
    # The first of four was not counted.
    expected = [1 / (0.25 * 2**turn) for turn in (1, 2, 3)]
    lower, median, upper = statistics.quantiles(expected, n=4)
    each = found["models"]["tiring"]["prefill_tokens_per_second"]
    assert each == pytest.approx({"median": median, "lower": lower, "upper": upper}, rel=1e-12)


def test_shared_weights_take_memory_once():
    tied = tiny_gpt2()
    parameters = sum(parameter.numel() for parameter in tied.parameters())
    assert own_bytes(tied) == 4 * parameters
    named = sum(4 * tensor.numel() for tensor in tied.state_dict().values())
    assert named == own_bytes(tied) + 4 * tied.lm_head.weight.numel(), "the head must have a name of its own"
    untied = GPT2LMHeadModel(tiny_gpt2(tie_word_embeddings=False).config)
    assert own_bytes(untied) == named


SECRET = "/home/somebody/models/private"


@pytest.mark.parametrize(
    "error, line",
    [
        (
            subprocess.CalledProcessError(
                1, [SECRET], stderr=f"  File {SECRET}\nsafetensors.SafetensorError: {SECRET} is not there\n"
            ),
            "not measured: its process ended with status 1 (SafetensorError)",
        ),
        (subprocess.CalledProcessError(-9, [SECRET], stderr=""), "not measured: its process ended with status -9"),
        (OSError(28, "No space left on device", SECRET), "not measured: OSError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not measured: OutOfMemoryError"),
    ],
)
def test_memory_fails_alone(clock, monkeypatch, error, line):
    whole = measured(clock)

    def peak(subject, ids, new_tokens):
        if subject.model.name == "slow":
            raise error
        return 123

    monkeypatch.setattr(module, "peak_memory", peak)
    found = measured(clock, memory=True)
    assert found["models"]["quick"].pop("peak_memory") == 123
    assert "peak_memory" not in found["models"]["slow"]
    assert found["protocol"].pop("peak_memory") == ["resident, of a process of its own", line]
    assert SECRET not in json.dumps(found) and found == whole


def test_a_child_process_that_fails_says_so_without_paths(clock, monkeypatch):
    """A real process, which does not find what it should run."""
    monkeypatch.setattr(module, "__name__", "no_such_module_anywhere")
    monkeypatch.setattr(Timed, "save_pretrained", lambda self, folder: None, raising=False)
    whole = measured(clock)
    found = measured(clock, memory=True)
    line = "not measured: its process ended with status 1 (ModuleNotFoundError)"
    assert found["protocol"].pop("peak_memory") == [line, line]
    assert found == whole


@pytest.mark.full
def test_the_child_process_runs_nothing_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("torch", "yaml", "accelerate"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w').close()\nraise ImportError('a canary')")
    assert module.peak_memory(evaluated(tiny_gpt2()), torch.zeros(1, 4, dtype=torch.long), 1) > 1e7
    assert not (tmp_path / "canary").exists()


def test_mistakes_of_this_code_are_not_taken_for_failures(clock, monkeypatch):
    def peak(subject, ids, new_tokens):
        raise AttributeError("a mistake")

    monkeypatch.setattr(module, "peak_memory", peak)
    with pytest.raises(AttributeError, match="a mistake"):
        measured(clock, memory=True)
    assert ERROR.findall("OSError: one\n\nValueError: two\nnot at the beginning: KeyError") == [
        "OSError",
        "ValueError",
    ]
    assert reason(RuntimeError(SECRET)) == "RuntimeError"
